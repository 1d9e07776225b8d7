import numpy as np

from prumerge_jax.messages import quoted, shortened


def test_values_are_shown_in_one_short_line() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert quoted(None) == "None"
    assert quoted("x" * 500) == "'" + "x" * 38 + "..." + "x" * 37 + "'"
    assert len(quoted({"key": list(range(1000))}, 40)) == 40
    assert "\n" not in quoted(np.zeros((3, 3)))
    path = "/data/" + "folder/" * 30 + "image.png"
    assert shortened(path).startswith("/data/folder")
    assert shortened(path).endswith("/image.png")
    assert len(shortened(path)) == 80
    assert shortened(path, 400) == path

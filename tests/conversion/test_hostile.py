"""A corpus of hostile and broken checkpoints: each is refused, none runs, none fills memory."""

import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import encode as encode_safetensors
from prumerge_jax.conversion.torch_bin import encode
from tests.conversion.checkpoints import (
    TINY,
    edit_config,
    named,
    original,
    random_adapter,
    random_tensors,
    write_clip,
    write_hf,
    write_llama,
    write_llava,
    write_peft,
    write_tensors,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Runs all cases in one process that has no network, and says what became of each.
PROGRAM = """
import json, pathlib, socket, sys, time
def no_network(*_, **__):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = no_network
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.tensor_files import ConversionError
from benchmarks.measuring import peak_resident_gb
outcomes = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    parts = {name: folder / name for name in ("vision_tower", "adapter", "projector")}
    sources = Sources(
        folder / "in",
        **{name: part for name, part in parts.items() if part.exists()},
        adapter_base="lmsys/vicuna-7b-v1.5" if parts["adapter"].exists() else None,
        allow_pickle=not (folder / "no_pickle").exists(),
    )
    started = time.process_time()
    try:
        try:
            model = open_model(sources)
        finally:
            seconds = time.process_time() - started
        convert(model, folder / "out")
        outcomes[folder.name] = "accepted", seconds
    except ConversionError as error:
        outcomes[folder.name] = str(error), seconds
print(json.dumps([peak_resident_gb(), outcomes]))
"""

Outcomes = tuple[float, dict[str, tuple[str, float]]]
"""Peak memory in GB; by case the message and the CPU seconds of `open_model`."""
Case = Callable[[pathlib.Path], None]
CASES: dict[str, tuple[Case, str]] = {}


def case(message: str) -> Callable[[Case], Case]:
    def register(build: Case) -> Case:
        CASES[build.__name__] = build, message
        return build

    return register


class Canary:
    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def hf(folder: pathlib.Path, **changes: object) -> dict[str, np.ndarray]:
    """A sound directory; `changes` go into its config."""
    tensors = write_hf(folder / "in")
    edit_config(folder / "in", **changes)
    return tensors


def replace_weights(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / "in" / "model.safetensors").write_bytes(encode_safetensors(tensors))


def edit_weights(folder: pathlib.Path, key: str, array: np.ndarray | None) -> None:
    tensors = hf(folder) | ({} if array is None else {key: array})
    if array is None:
        del tensors[key]
    replace_weights(folder, named(tensors))


def pickled_archive(value: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, 2))
    return buffer.getvalue()


def bin_checkpoint(folder: pathlib.Path, content: bytes) -> None:
    hf(folder)
    (folder / "in" / "model.safetensors").unlink()
    (folder / "in" / "pytorch_model.bin").write_bytes(content)


def lora(folder: pathlib.Path, **options: object) -> None:
    config = original()
    tensors = random_tensors(config)
    write_llama(folder / "in", tensors, config)
    write_clip(folder / "vision_tower", tensors)
    projector = {k: a for k, a in tensors.items() if k.startswith("multi_modal")}
    write_peft(folder / "adapter", random_adapter(config, 4), projector, config, **options)


def shards(folder: pathlib.Path, **files: str) -> None:
    """A sharded checkpoint whose index is altered."""
    tensors = hf(folder)
    (folder / "in" / "model.safetensors").unlink()
    write_tensors(folder / "in", named(tensors), 20_000)
    path = folder / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= files
    path.write_text(json.dumps(index))


@case("calls '.*system', which builds no tensor")
def pickle_that_runs_a_program(folder: pathlib.Path) -> None:
    bin_checkpoint(folder, pickled_archive(Canary()))


@case("calls '.*system'")
def pickle_hidden_in_a_state_dict(folder: pathlib.Path) -> None:
    bin_checkpoint(folder, pickled_archive({"lm_head.weight": Canary()}))


@case("calls 'builtins.exec'")
def pickle_that_runs_python(folder: pathlib.Path) -> None:
    code = b"cbuiltins\nexec\n(X\x1b\x00\x00\x00open('canary','w').close()#tR."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    bin_checkpoint(folder, buffer.getvalue())


@case("is a PyTorch pickle; if you trust")
def pickle_without_leave(folder: pathlib.Path) -> None:
    bin_checkpoint(folder, pickled_archive(Canary()))
    (folder / "no_pickle").touch()


@case("a bare pickle")
def pickle_of_old_torch(folder: pathlib.Path) -> None:
    bin_checkpoint(folder, pickle.dumps(Canary(), 2))


@case("is compressed")
def zip_bomb(folder: pathlib.Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"}." + bytes(64 << 20))
    bin_checkpoint(folder, buffer.getvalue())


@case("unexpected or repeated entry")
def zip_traversal(folder: pathlib.Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/../../canary", b"")
    bin_checkpoint(folder, buffer.getvalue())


@case("adapter_model.bin: corrupt or truncated, its zip directory cannot be read")
def zip_cut_off_as_the_first_published_adapter(folder: pathlib.Path) -> None:
    lora(folder)
    path = folder / "adapter" / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])


@case("no entry where .* should be")
def zip_with_wrong_offsets(folder: pathlib.Path) -> None:
    content = bytearray(encode(named(random_tensors())))
    second = content.index(b"PK\x03\x04", 10)
    content[second : second + 4] = b"XXXX"
    bin_checkpoint(folder, bytes(content))


@case("shard '../outside.safetensors' is not a plain file name")
def index_traversal(folder: pathlib.Path) -> None:
    shards(folder, **{"language_model.lm_head.weight": "../outside.safetensors"})


@case("shard '/etc/passwd' is not a plain file name")
def index_absolute(folder: pathlib.Path) -> None:
    shards(folder, **{"language_model.lm_head.weight": "/etc/passwd"})


@case("missing shards: model-00077-of-00077.safetensors")
def index_of_a_missing_shard(folder: pathlib.Path) -> None:
    shards(folder, **{"language_model.lm_head.weight": "model-00077-of-00077.safetensors"})


@case("plain file name")
def bin_index_traversal(folder: pathlib.Path) -> None:
    bin_checkpoint(folder, b"")
    (folder / "in" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../../canary.bin"}})
    )


@case("its data ends at 63776, the file's at .*; truncated")
def safetensors_cut_off(folder: pathlib.Path) -> None:
    hf(folder)
    path = folder / "in" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("declares a header of 1099511627776 bytes")
def safetensors_absurd_header(folder: pathlib.Path) -> None:
    hf(folder)
    path = folder / "in" / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes())
    os.truncate(path, 1 << 42)  # sparse


@case("overlaps another tensor")
def safetensors_overlap(folder: pathlib.Path) -> None:
    hf(folder)
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    (folder / "in" / "model.safetensors").write_bytes(content)


@case("repeated keys")
def safetensors_repeated_key(folder: pathlib.Path) -> None:
    hf(folder)
    entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    text = b"{" + entry + b"," + entry + b"}"
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    (folder / "in" / "model.safetensors").write_bytes(content)


@case("declares a header")
def safetensors_that_is_a_git_lfs_pointer(folder: pathlib.Path) -> None:
    hf(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9976634558\n"
    (folder / "in" / "model.safetensors").write_text(pointer)


@case("model.safetensors is a link that leads out of its directory")
def safetensors_that_is_a_device(folder: pathlib.Path) -> None:
    hf(folder)
    path = folder / "in" / "model.safetensors"
    path.unlink()
    path.symlink_to("/dev/zero")


@case("holds no weights")
def safetensors_that_is_a_pipe(folder: pathlib.Path) -> None:
    hf(folder)
    path = folder / "in" / "model.safetensors"
    path.unlink()
    os.mkfifo(path)


def safetensors_header(folder: pathlib.Path, text: bytes) -> None:
    hf(folder)
    content = len(text).to_bytes(8, "little") + text
    (folder / "in" / "model.safetensors").write_bytes(content)


@case("declares a header of 9.* expected at most")
def safetensors_header_of_empty_lists(folder: pathlib.Path) -> None:
    safetensors_header(folder, b"[" + b"[]," * (3 << 20) + b"[]]")


@case("the header is not an object")
def safetensors_header_of_lists_below_the_limit(folder: pathlib.Path) -> None:
    safetensors_header(folder, b"[" + b"[]," * (1 << 19) + b"[]]")


@case("25000 tensors in one file")
def safetensors_of_many_empty_tensors(folder: pathlib.Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    safetensors_header(folder, json.dumps({str(n): entry for n in range(25_000)}).encode())


@case("model.safetensors.index.json: larger than")
def index_of_many_names(folder: pathlib.Path) -> None:
    shards(folder, **{f"a{n}": "model-00001-of-00009.safetensors" for n in range(100_000)})


@case("names a class by a tuple")
def pickle_of_a_tower_of_tuples(folder: pathlib.Path) -> None:
    from tests.conversion.test_torch_bin import DOUBLINGS, archive

    bin_checkpoint(folder, archive(DOUBLINGS))


@case("is not a SentencePiece model")
def tokenizer_of_random_bytes(folder: pathlib.Path) -> None:
    hf(folder)
    content = np.random.default_rng(0).bytes(5000)
    (folder / "in" / "tokenizer.model").write_bytes(content)


@case("too many for a tokenizer")
def tokenizer_of_a_terabyte(folder: pathlib.Path) -> None:
    hf(folder)
    (folder / "in" / "tokenizer.model").touch()
    os.truncate(folder / "in" / "tokenizer.model", 1 << 40)


@case("tokenizer_config.json is a link that leads out of its directory")
def link_to_a_private_file(folder: pathlib.Path) -> None:
    hf(folder)
    (folder / "in" / "tokenizer_config.json").symlink_to("/etc/passwd")


@case("adapter_config.json is a link that leads out")
def link_in_an_adapter(folder: pathlib.Path) -> None:
    lora(folder)
    path = folder / "adapter" / "adapter_config.json"
    path.rename(folder / "elsewhere")
    path.symlink_to("../elsewhere")


@case("holds NaN or infinity")
def nan_weights(folder: pathlib.Path) -> None:
    edit_weights(folder, "multi_modal_projector.linear_1.bias", np.full(24, np.nan, np.float16))


@case("holds NaN or infinity")
def infinite_weights(folder: pathlib.Path) -> None:
    edit_weights(folder, "language_model.norm.weight", np.full(24, np.inf, np.float32))


@case("dtype int8; weights must be")
def integer_weights(folder: pathlib.Path) -> None:
    edit_weights(folder, "lm_head.weight", np.zeros((128, 24), np.int8))


@case("dtype float64; weights must be")
def double_weights(folder: pathlib.Path) -> None:
    edit_weights(folder, "lm_head.weight", np.zeros((128, 24)))


@case(r"another shape .*lm_head.weight \[24, 128\] not \[128, 24\]")
def swapped_shape(folder: pathlib.Path) -> None:
    edit_weights(folder, "lm_head.weight", np.zeros((24, 128), np.float16))


@case("missing tensors: language_model.layers.1.mlp.gate_proj.weight")
def missing_tensor(folder: pathlib.Path) -> None:
    edit_weights(folder, "language_model.layers.1.mlp.gate_proj.weight", None)


@case("unknown tensors: .*layers.2.mlp.gate_proj.weight")
def layer_too_many(folder: pathlib.Path) -> None:
    gate = np.zeros((40, 24), np.float16)
    edit_weights(folder, "language_model.layers.2.mlp.gate_proj.weight", gate)


@case("stored twice: lm_head.weight and language_model.lm_head.weight")
def one_tensor_under_two_names(folder: pathlib.Path) -> None:
    tensors = named(hf(folder))
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    replace_weights(folder, tensors)


@case("leaves its storage")
def tensor_expanded_from_two_numbers(folder: pathlib.Path) -> None:
    from tests.conversion.test_torch_bin import archive, tensor

    bin_checkpoint(folder, archive(tensor((1 << 40,), (0,)), _0=bytes(8)))


@case("not valid JSON")
def config_that_is_a_web_page(folder: pathlib.Path) -> None:
    hf(folder)
    (folder / "in" / "config.json").write_text("<!doctype html><title>404</title>")


@case("larger than")
def config_of_a_terabyte(folder: pathlib.Path) -> None:
    hf(folder)
    os.truncate(folder / "in" / "config.json", 1 << 40)


@case("nested too deeply")
def config_nested(folder: pathlib.Path) -> None:
    hf(folder)
    (folder / "in" / "config.json").write_text('{"a":' * 100_000)


@case("num_layers: 1000000000000 is outside")
def config_of_a_trillion_layers(folder: pathlib.Path) -> None:
    hf(folder, text_config__num_hidden_layers=10**12)


@case("none of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Video-LLaVA, LLaMA, CLIP")
def config_with_remote_code(folder: pathlib.Path) -> None:
    hf(
        folder,
        architectures=["EvilModel"],
        text_config=...,
        vision_config=...,
        model_type="evil",
        auto_map={"AutoModel": "modeling_evil.EvilModel"},
    )
    (folder / "in" / "modeling_evil.py").write_text("open('canary', 'w')")


@case("num_additional_image_tokens is 0; only 1 is supported")
def processor_of_575_tokens(folder: pathlib.Path) -> None:
    hf(folder)
    (folder / "in" / "processor_config.json").write_text('{"num_additional_image_tokens": 0}')


@case("use_rslora is True")
def adapter_of_another_scale(folder: pathlib.Path) -> None:
    lora(folder, use_rslora=True)


@case("base_model_name_or_path|trained on 'x/y'")
def adapter_of_another_base(folder: pathlib.Path) -> None:
    lora(folder, base_model_name_or_path="x/y")


@case("missing tensors: multi_modal_projector.linear_1.bias")
def projector_not_whole(folder: pathlib.Path) -> None:
    config = original()
    tensors = random_tensors(config)
    write_llava(folder / "in", tensors, config)
    write_clip(folder / "vision_tower", tensors)
    own = named(
        {k: a for k, a in tensors.items() if not k.startswith("vision")}, Dialect.LLAVA, config
    )
    del own[keys.dialect_key("multi_modal_projector.linear_1.bias", Dialect.LLAVA, config)]
    replace_weights(folder, own)


@case("mm_image_tower says Video-LLaVA")
def another_family(folder: pathlib.Path) -> None:
    hf(folder, mm_image_tower="x")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    root = tmp_path_factory.mktemp("hostile")
    for name, (build, _) in CASES.items():
        (root / name).mkdir()
        build(root / name)
    (root / "sound").mkdir()
    hf(root / "sound")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak_gb, outcomes = json.loads(done.stdout.splitlines()[-1])
    assert not (ROOT / "canary").exists()
    left = [path for name in CASES for path in (root / name).glob("out*")]
    assert not left
    return peak_gb, outcomes


@pytest.mark.parametrize("name", CASES)
def test_each_is_refused_in_one_line(outcomes: Outcomes, name: str) -> None:
    import re

    message, seconds = outcomes[1][name]
    assert seconds < 1
    assert re.search(CASES[name][1], message), message
    assert "\n" not in message
    assert len(message) < 800


def test_the_corpus_is_what_it_claims(outcomes: Outcomes) -> None:
    peak_gb, by_name = outcomes
    assert len(CASES) >= 20
    assert by_name["sound"][0] == "accepted"  # so that each case is refused for its fault
    assert peak_gb < 1
    assert TINY.text.num_layers == 2  # the layer numbers above rely on it

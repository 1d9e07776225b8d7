"""Every field of an evaluation; without flags it scores the miniature on its digits."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The default of `eval.py`."""
    config = ConfigDict()
    config.checkpoint = "miniature-any-budget"  # model directory, or the name of a shipped one
    # None: answers without a score where there are questions, else the miniature's digits.
    config.benchmark = placeholder(str)
    config.questions = placeholder(str)  # question file of the benchmark, or your own
    config.images = placeholder(str)  # folder of the questions' image paths
    config.annotations = placeholder(str)  # what the scorer compares with
    config.tasks = ()  # several benchmarks: dicts of the four fields above
    config.answers = placeholder(str)  # score this file, without a model

    # Names, separated by spaces. None: the benchmark's default, "full prumerge+ prumerge" but for
    # the digits.
    config.reduction = placeholder(str)
    config.tokens = ""  # budgets of those that keep a fixed count, such as "128 64 32"
    config.baselines = False  # also, at equal counts: random, uniform and a smaller image
    config.decoding = ConfigDict(
        {
            "protocol": "llava-1.6",
            "conversation": placeholder(str),  # None: the model's own template
            # None: the benchmark's default, which is compact but for the digits.
            "position_ids": placeholder(str),
            "max_new_tokens": placeholder(int),  # None: the benchmark's limit
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "num_workers": 0,
        }
    )
    config.dtype = placeholder(str)  # None: as stored
    # Format of the decoder's kernels: int8, int8x8, int4 or nf4. None: the checkpoint's own.
    config.quantize = placeholder(str)
    config.cache_dtype = placeholder(str)  # int8: keys and values in 8 bits. None: as computed
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    # Shapes of the jitted functions, see engine/shapes.py. None: fitted to questions and mesh.
    config.engine = ConfigDict(
        {
            "batch_size": placeholder(int),  # images per encode step
            "window_size": placeholder(int),  # questions that are planned together
            "row_length": placeholder(int),  # tokens per packed row
            "prefill_rows": placeholder(int),  # packed rows per prefill
            "slots": placeholder(int),  # sequences decoded at once
            "page_size": placeholder(int),  # tokens per page of keys and values
            "pages": placeholder(int),  # pages in the pool; default: what the device holds
            "cache_length": placeholder(int),  # tokens of the longest sequence
            "decode_steps_per_call": placeholder(int),
            "share_prefixes": True,  # whether questions about one image have it computed once
        }
    )
    config.chip = placeholder(str)  # print achieved speed against this chip's floor
    config.digits = ConfigDict({"split": "test", "scenes": 1000})
    return config

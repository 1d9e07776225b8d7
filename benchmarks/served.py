"""A server for `serving.py`: random weights, numbers of visual tokens that are drawn.

Random weights say nothing about how many tokens an image needs, so the counts of `--means` are
drawn from the lognormal distribution of `scoring.py` and put in place of the measured ones. The
tower, the reduction and everything after them run as in any server. With `--static` a batch of
requests begins together, and the next one when all of it have ended: an engine without continuous
batching.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from drawn import MEANS, DrawnCounts, drawn_counts
from models import geometry, random_llava_for_inference

from prumerge_jax import reductions
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.tokenizer import load_tokenizer, tokenizer_file
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.request import Answer, Delta, Request
from prumerge_jax.llava import Llava
from prumerge_jax.serve import logs
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.engines import engine_config
from prumerge_jax.serve.keys import Keys
from prumerge_jax.serve.model import ServedModel
from prumerge_jax.serve.run import listen, serve_model
from prumerge_jax.serve.scheduler import Core

MINIATURE = "miniature"
DRAWS = 1024


class WholeAnswers:
    """An engine whose answers are as long as was asked for: no token ends one."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def submit(self, request: Request) -> None:
        """Queues a request."""
        sampling = dataclasses.replace(request.sampling, stop_ids=())
        self._core.submit(dataclasses.replace(request, sampling=sampling))

    def cancel(self, key: int) -> None:
        """Ends a request."""
        self._core.cancel(key)

    def step(self) -> list[Delta | Answer]:
        """Runs a little."""
        return self._core.step()


class StaticBatches(WholeAnswers):
    """One whose requests begin together, `slots` at once, when all earlier ones are done."""

    def __init__(self, core: Core, slots: int) -> None:
        super().__init__(core)
        self._slots = slots
        self._waiting: dict[int, Request] = {}
        self._running: set[int] = set()

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self._waiting[request.key] = request

    def cancel(self, key: int) -> None:
        """Ends a request that runs; one that waits runs with its batch nevertheless."""
        if key in self._running:
            super().cancel(key)

    def step(self) -> list[Delta | Answer]:
        """Runs a little."""
        if not self._running:
            for key in list(self._waiting)[: self._slots]:
                self._running.add(key)
                super().submit(self._waiting.pop(key))
        events = super().step()
        self._running -= {event.key for event in events if isinstance(event, Answer)}
        return events


class DrawnModel(ServedModel):
    """A served model with drawn counts."""

    is_static = False

    def engine(self, lane: str) -> Core:
        """The server's engine, with these counts and, perhaps, without continuous batching."""
        engine = super().engine(lane)
        for spelling, each in engine.engines.items():
            patches = each.model.config.vision.num_patches
            mean = MEANS.get(spelling) if each.reduction.varying else None
            if self.config.checkpoint != MINIATURE and mean is not None:
                most = reductions.parse(spelling).capacity_for(patches)
                each.encoder = encoder = DrawnCounts(each.model, each.shapes)
                encoder.counts = drawn_counts(DRAWS, mean, most, seed=1)
        slots = self.llava.engine_sizes.slots
        return StaticBatches(engine, slots) if self.is_static else WholeAnswers(engine)


def random_model(name: str, config: ServeConfig) -> Llava:
    """Random weights of these sizes, with the miniature's tokenizer and vocabulary."""
    tokenizer = load_tokenizer(tokenizer_file(model_directory(MINIATURE)))
    sizes = geometry(name)
    text = dataclasses.replace(sizes.text, vocab_size=tokenizer.vocab_size)
    sizes = dataclasses.replace(sizes, text=text, chat_template="v1")
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = PlacedModel(*random_llava_for_inference(sizes, dtype), sizes, dtype)
    return Llava(model, tokenizer, engine=engine_config(config))


def main(argv: Sequence[str] | None = None) -> None:
    """Serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", required=True, help="sizes of the model, or miniature")
    parser.add_argument("--reductions", nargs="+", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True, help="most tokens of an answer")
    parser.add_argument("--static", action="store_true", help="without continuous batching")
    arguments = parser.parse_args(argv)
    config = ServeConfig(
        checkpoint=arguments.geometry,
        served_model_name="model",
        reductions=tuple(arguments.reductions),
        position_ids="original" if arguments.geometry == MINIATURE else "compact",
        slots=arguments.slots,
        max_prompt_tokens=128,
        max_new_tokens=arguments.new_tokens,
        max_queue=100_000,
        queue_timeout_s=3600.0,
        request_timeout_s=3600.0,
    )
    logs.configure(as_json=False)
    listening = listen("127.0.0.1", 0)
    if arguments.geometry == MINIATURE:
        llava = Llava.load(MINIATURE, engine=engine_config(config))
    else:
        llava = random_model(arguments.geometry, config)
    model = DrawnModel(llava, config)
    model.is_static = arguments.static
    sys.exit(serve_model(model, "random", Keys(None), listening))


if __name__ == "__main__":
    main()

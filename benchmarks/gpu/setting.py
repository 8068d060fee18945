"""What all stages share: where they run, how large, and the models that they load once."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.shapes import Shape
    from live.pair import Pair

NO_GRAPHS = "no-graphs"
"""The file in ``work`` that says why graphs are not captured any more."""


@dataclass
class Setting:
    """The run.

    device    torch's name of it
    work      folder for what is not carried home: recordings, trained models
    out       folder of the result files
    rehearse  everything at toy size, to see that it runs; the numbers mean nothing
    corpus    folder of training text (live/reference/README.md), or None
    """

    device: str
    out: Path
    rehearse: bool = False
    corpus: Path | None = None
    _small: dict[tuple[str, tuple[str, ...]], Pair] = field(default_factory=dict)
    _embedded: Pair | None = None

    @property
    def work(self) -> Path:
        return self.out / "work"

    def pick(self, real: Any, toy: Any) -> Any:
        """The size to use: ``real``, or ``toy`` in a rehearsal."""
        return toy if self.rehearse else real

    @cached_property
    def true_shape(self) -> Shape:
        """LLaMA-3.1-8B, whose price the small pair's text is sold at."""
        from benchmarks.gpu.shapes import TOY, named_shape

        return TOY if self.rehearse else named_shape("llama-3.1-8b")

    def shape(self, name: str) -> Shape:
        """A published shape, or a toy in its place."""
        from benchmarks.gpu.shapes import TOY, named_shape

        return replace(TOY, name=f"toy {name}") if self.rehearse else named_shape(name)

    def small_pair(self, dtype: str, drafts: tuple[str, ...] = ("reference/eagle3", "reference/draft")) -> Pair:
        """The shipped pair, loaded once."""
        from live.pair import load_pair

        if (dtype, drafts) not in self._small:
            self._small[dtype, drafts] = load_pair("reference", list(drafts), dtype, self.device)
        return self._small[dtype, drafts]

    def embedded(self) -> Pair:
        """The shipped pair at the true shape in bfloat16, made once."""
        from benchmarks.gpu.embedding import embedded_pair

        if self._embedded is None:
            import torch

            small = self.small_pair("float32", ("reference/eagle3",))
            self._embedded = embedded_pair(small, self.true_shape, torch.bfloat16, self.device)
        return self._embedded

    @cached_property
    def graphs(self) -> bool:
        """Whether CUDA graphs are captured here and give what plain calls give, tried once on the small pair. Where they do not,
        the same fixed shapes run kernel by kernel, and results say so.

        :raises RuntimeError: when CUDA has ended the first capture, and with it the use of this process.
        """
        import sys

        import torch

        from benchmarks.gpu.check import why_no_graphs
        from live.graphed import failed_captures

        if torch.device(self.device).type != "cuda":
            return False
        told = self.work / NO_GRAPHS
        why = told.read_text() if told.is_file() else why_no_graphs(self.small_pair("float32", ("reference/eagle3",)))
        if failed_captures:
            raise RuntimeError(f"a capture failed: {failed_captures[0]}")
        if why:
            print(f"CUDA graphs are left out: {why}", file=sys.stderr, flush=True)
        return not why

    def leave_graphs_out(self, why: str) -> None:
        """In all runs with this folder from now on."""
        (self.work / NO_GRAPHS).write_text(why)

    def about(self) -> dict[str, Any]:
        """What results must share to stand in one file."""
        import numpy
        import pyarrow
        import scipy
        import torch
        import transformers

        from traces.machine import describe_machine

        modules = (torch, transformers, numpy, scipy, pyarrow)
        return {
            "rehearsal": self.rehearse,
            "device": self.device,
            "machine": describe_machine(self.device),
            "libraries": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules},
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        }


def free_memory() -> None:
    """Give back what is no longer used, so that what comes next finds the GPU empty."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

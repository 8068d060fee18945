"""Few rows times a weight matrix, on a CPU: the rows are laid out for the matrix, not the matrix for the rows.

``torch.nn.functional.linear`` has the CPU's library repack the whole weight for every product, which for two to some thirty
rows - a draft level, a verified tree - costs more than the product itself. Weight times transposed rows does without: in float32
and four rows, 0.35 against 1.2 ms at 6144 x 256, and a verification of four tokens of the reference target took a third less
time. A single row goes to another routine, slower for wide layers than two rows are: there it is multiplied twice, which makes
plain decoding a tenth faster. The sums are the same up to float32's rounding; other types and other numbers of rows go the
usual way.

That was on AMD EPYC. The library is Intel's own, and on Intel's processors its product of few rows is the quicker one (a token of
the reference target took 7.4 ms with PyTorch's layers and 10.4 ms with these): there they stay. ``python -m benchmarks.few_rows``
measures both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

#: Numbers of rows for which the turned product is the faster one.
FEW = range(1, 33)
#: Outputs from which a single row is multiplied as two.
WIDE = 512


class FewRowsLinear(nn.Linear):
    """A linear layer that multiplies few float32 rows the quicker way; its parameters are those it had before."""

    def forward(self, input: Tensor) -> Tensor:
        """Values [..., in] as [..., out]."""
        rows = input.numel() // input.shape[-1]
        if rows not in FEW or input.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(input)
        if rows == 1 and len(self.weight) < WIDE:
            return super().forward(input)
        flat = input.reshape(rows, -1)
        turned = (flat.repeat(2, 1) if rows == 1 else flat).t()
        product = torch.mm(self.weight, turned) if self.bias is None else torch.addmm(self.bias[:, None], self.weight, turned)
        return product[:, :rows].t().contiguous().view(*input.shape[:-1], -1)


@cache
def worth_it() -> bool:
    """Whether this machine's processor is not Intel's; by its maker, not by a timing, so that every run computes the same bits."""
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def quicken(model: nn.Module) -> nn.Module:
    """The model itself; where it is worth it, its plain linear layers on a CPU are now of :class:`FewRowsLinear`. Others,
    subclasses too, stay as they were."""
    if not worth_it():
        return model
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = FewRowsLinear
    return model

"""A pair whose target, EAGLE heads and DFlash drafters run in fixed shapes: CUDA graphs on a GPU (live/graphed.py)."""

from __future__ import annotations

from live.dflash_network import DFlashNetwork
from live.eagle_network import EagleNetwork
from live.graphed import GraphedModel
from live.graphed_dflash import GraphedDFlash
from live.graphed_eagle import GraphedEagle
from live.looking_up_first import Drafts
from live.model import CachedModel
from live.pair import Pair


class GraphedPair(Pair):
    """The pair; targets are made with ``capacity`` slots per row."""

    capacity = 2048
    graphs = True

    def target(self, rows: int = 1, drafter: Drafts | None = None) -> CachedModel:
        return GraphedModel(self.model, rows, self.capacity, self.captured_for(drafter), self.graphs)

    def plain(self, rows: int = 1) -> CachedModel:
        return GraphedModel(self.model, rows, self.capacity, (), self.graphs)


def graphed(pair: Pair, capacity: int = 2048, graphs: bool = True) -> GraphedPair:
    """The same pair in fixed shapes; a draft language model and Medusa heads stay as they are.

    :param capacity: slots per row, for the longest text with its tree and 128 more.
    :param graphs: replay CUDA graphs on a GPU; False: the same shapes, kernel by kernel.
    """
    fixed = {EagleNetwork: GraphedEagle, DFlashNetwork: GraphedDFlash}
    networks = {
        name: fixed[type(one)](one.head, name, capacity, graphs, one.features) if type(one) in fixed else one
        for name, one in pair.networks.items()
    }
    made = GraphedPair(pair.model, pair.tokenizer, networks, pair.captured, pair.description)
    made.capacity, made.graphs = capacity, graphs
    return made

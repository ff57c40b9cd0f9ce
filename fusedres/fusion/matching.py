"""All passes over one flat graph: the same for ``fuse``, ``explain`` and ``torch.compile(backend="fusedres")``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import Values
from fusedres.fusion.gradient_forks import EndRewriter
from fusedres.fusion.linear_patterns import LinearRewriter
from fusedres.fusion.options import Options
from fusedres.fusion.patterns import BatchNormRewriter
from fusedres.fusion.preact_sums import SumRewriter
from fusedres.fusion.rewriting import Call


def match(
    root: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None], options: Options
) -> list[Call]:
    """Fold the patterns of ``graph`` in place; ``refusal`` says why a layer must stay as it is.

    Returns:
        A row for each call of a normalisation, in the order of the calls.
    """
    values = Values(root, graph)
    before = len(graph.nodes)
    calls: list[Call] = []
    if any(isinstance(values.module(node), _BatchNorm) for node in graph.nodes):
        calls = BatchNormRewriter(values, refusal, options).run()
    linear = LinearRewriter(values, refusal, options).run() if options.allows("linear") else []
    if len(graph.nodes) != before:
        values.without_needless_clones()
    if calls and options.allows("preact"):
        SumRewriter(values, refusal, options).run(calls)
    if calls:
        EndRewriter(values, refusal, options).run(calls)
    return calls + linear

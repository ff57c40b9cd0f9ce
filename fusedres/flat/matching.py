"""All passes over one flat graph: the same for ``fuse``, ``explain`` and ``torch.compile(backend="fusedres")``."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.flat.aliasing import Values
from fusedres.flat.gradient_forks import EndRewriter
from fusedres.flat.linear_patterns import LinearRewriter
from fusedres.flat.options import Options
from fusedres.flat.patterns import BatchNormRewriter
from fusedres.flat.preact_sums import SumRewriter
from fusedres.flat.rewriting import Call


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

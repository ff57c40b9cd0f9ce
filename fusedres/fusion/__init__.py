"""One call that fuses a model, the way back, and the account of both."""

from fusedres.fusion.convert import fuse, unfuse
from fusedres.fusion.explain import Explanation, explain

__all__ = ["Explanation", "explain", "fuse", "unfuse"]

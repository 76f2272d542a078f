"""What the kernels of a training step read, write and are, counted as they are called."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what multiplies matrices, and what calls no kernel
PRODUCTS = ("mm", "bmm", "addmm", "_scaled_dot_product")
NOTHING = ("detach", "_unsafe_view", "empty", "new_empty", "empty_like", "_reshape_alias")
# these read rows, not whole tables
OF_ROWS = ("index_select", "embedding", "_embedding_bag", "gather", "index")


class Kernels(TorchDispatchMode):
    """While entered: `moved` bytes read and written by everything but products, and the number of `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.calls = 0

    @property
    def moved(self) -> int:
        """Bytes of all kernels but products."""
        return sum(size for name, size in self.by_name.items() if not name.startswith(PRODUCTS))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NOTHING:
            read = {} if name.startswith(OF_ROWS) else {id(t): _size(t) for t in tree_leaves((args, kwargs))}
            written = sum(_size(t) for t in tree_leaves(out))
            self.by_name[name] += sum(read.values()) + written * (2 if name.startswith(OF_ROWS) else 1)
            self.calls += 1
        return out


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) and not value.is_sparse else 0

"""How many of torch's operators a computation runs: on a GPU each is a kernel to launch, if not several."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# These only describe memory in another way, allocate it or look at it.
_NO_KERNEL = {
    f"aten::{name}"
    for names in (
        "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided as_strided_ chunk detach detach_",
        "empty empty_like empty_strided expand expand_as flatten is_nonzero item lift_fresh narrow numpy_T",
        "permute reshape resize_ resolve_conj resolve_neg result_type select set_ slice split",
        "split_with_sizes squeeze t to transpose unbind unflatten unsqueeze view view_as",
    )
    for name in names.split()
}


def count_operators(run: Callable[[], object]) -> int:
    """The operators in which ``run`` computes something or copies it, each without those that call it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(
        event.name.startswith("aten::")
        and event.name not in _NO_KERNEL
        and not any(
            child.name.startswith("aten::") and child.name not in _NO_KERNEL for child in event.cpu_children
        )
        for event in seen.events()
    )

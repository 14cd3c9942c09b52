"""Work of a GPU as one CUDA graph, which the host sets off with a single call."""

from collections.abc import Callable

import torch

WARM_UPS = 3  # eager runs before a capture: kernels are compiled, cuBLAS finds its workspace


def captured(
    compute: Callable[[], None],
    name: str,
    say: Callable[[str], None],
    ready: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """Replays ``compute``, whose tensors stay where they are; computes, where capturing fails.

    Args:
        compute: operations of the current CUDA device alone. It is run a few times first.
        name: of what it computes, in the plural, for ``say``.
        say: told that, and why, it runs eagerly, where it does.
        ready: called after those runs. From there on no thread may touch the device.
    """
    stream = torch.cuda.current_stream()
    _warm_up(compute)
    ready()
    try:
        return _capture(compute)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        say(f"{name} run eagerly: capturing them as a CUDA graph failed ({reason})")
        return compute
    finally:
        torch.cuda.set_stream(stream)  # where a failed capture leaves another one


def _warm_up(compute: Callable[[], None]) -> None:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(side)


def _capture(compute: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay

"""Running averages whose memory is a share of the run so far, and not a number of steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lightning_twa.candidates.profiles import MEAN, gamma_of, power_name
from lightning_twa.subspace import local_part, to_shards

__all__ = ["PowerAverages", "interval_of"]

SHARE = 0.003  # of the run, that one sum over steps is taken over
MOST = 500  # steps in a sum: it is in float32


def interval_of(steps: int | None) -> int:
    """Over how many steps weights are summed before the averages take them in.

    Args:
        steps: Of the run; ``None`` where that is not known.
    """
    return 1 if steps is None else min(max(int(SHARE * steps), 1), MOST)


class PowerAverages:
    """Averages of a module's trainable weights over all optimizer steps, in which step ``s`` has a
    weight proportional to ``s ** gamma`` (Karras et al., arXiv 2312.02696, section 3.1), and the
    plain mean of all steps (``gamma = 0``); of sharded weights this process's part.

    At each step the weights are added to one sum on their device. After every ``interval`` steps
    the averages, which are in main memory, take in its mean: with ``m`` steps since step ``t - m``,
    ``a += (1 - ((t - m) / t) ** (gamma + 1)) * (mean - a)``, so that the interval has the weight of
    its steps. On an accelerator nothing waits for that: the sum is copied in the stream of the
    training, and a thread does the rest.

    Args:
        widths: ``sigma_rel`` of each average, its standard deviation in time as a share of the run.
        interval: See :func:`interval_of`.
        in_background: Whether a thread takes the sums in; ``None``: where they are on another
            device.

    Attributes:
        updates: Optimizer steps that were seen.
    """

    def __init__(
        self,
        widths: Iterable[float] = (),
        interval: int = 1,
        *,
        in_background: bool | None = None,
    ) -> None:
        self.widths = tuple(widths)
        self.interval = interval
        self.in_background = in_background
        self.updates = 0
        self._gammas = [*(gamma_of(width) for width in self.widths), 0.0]
        self._averages: dict[str, list[Tensor]] = {}  # by parameter, one for each gamma
        self._sums: dict[str, Tensor] = {}
        self._summed = 0  # steps that are in the sums
        self._worker: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        sums = {name: t.to("cpu") for name, t in self._sums.items()}  # a copy may lack the device
        return {**vars(self), "_sums": sums, "_worker": None, "_pending": None}

    @property
    def names(self) -> list[str]:
        """Names of the candidates that they give; empty before the first update."""
        if not self.widths or not self.updates:
            return []
        return [*(power_name(width) for width in self.widths), MEAN]

    @torch.no_grad()
    def update(self, module: nn.Module, only: Collection[str] | None = None) -> None:
        """Take in the module's trainable weights, after each optimizer step.

        Args:
            module: The model.
            only: Names of those that are taken in; ``None`` for all.

        Raises:
            ValueError: Naming a parameter that has changed its shape.
        """
        if not self.widths:
            return
        to_shards(module)
        sums: list[Tensor] = []
        current: list[Tensor] = []
        for name, whole in module.named_parameters():
            # one that was trained stays in, also where it is frozen again
            if not whole.is_floating_point() or not (whole.requires_grad or name in self._sums):
                continue
            if only is not None and name not in only:
                continue
            parameter = local_part(whole).detach()
            held = self._sums.get(name)
            if held is None:
                held = self._begin(name, parameter)
            elif held.device != parameter.device:  # resumed
                held = self._sums[name] = held.to(parameter.device)
            if held.shape != parameter.shape:
                raise ValueError(
                    f"Parameter {name!r} has changed its shape in the run: {tuple(held.shape)} in "
                    f"the running averages, {tuple(parameter.shape)} now. Weights of different "
                    f"shapes cannot be averaged. Use CollectConfig(power_averages=()), and collect "
                    f"from where the model has its last form (start=...)."
                )
            sums.append(held)
            current.append(parameter.to(held.dtype))
        if sums:
            torch._foreach_add_(sums, current)
        self.updates += 1
        self._summed += 1
        if self.updates % self.interval == 0 or self._summed >= MOST:
            self._take_in()

    def _begin(self, name: str, parameter: Tensor) -> Tensor:
        """One that is trained from now on: until now it was what it is."""
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        wide = wide.contiguous()
        self._wait()
        self._averages[name] = [wide.to("cpu", copy=True) for _ in self._gammas]
        self._sums[name] = wide.mul_(self._summed)
        return self._sums[name]

    def _take_in(self) -> None:
        """Let the averages take in the mean of the steps that are summed."""
        self._wait()
        shares = self._shares()
        held = list(self._sums.values())
        averages = [self._averages[name] for name in self._sums]
        elsewhere = any(t.device.type != "cpu" for t in held)
        summed, self._summed = self._summed, 0
        if not (elsewhere if self.in_background is None else self.in_background):
            torch._foreach_div_(held, summed)
            _blend(averages, held, shares)
            torch._foreach_zero_(held)
            return
        means, copied = _copies(held)
        torch._foreach_zero_(held)

        def work() -> None:
            if copied is not None:
                copied.synchronize()
            torch._foreach_div_(means, summed)
            _blend(averages, means, shares)

        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "twa-averages")
        self._pending = self._worker.submit(work)

    def _shares(self) -> list[float]:
        """What the steps that are summed have in each average."""
        before = (self.updates - self._summed) / self.updates
        return [1 - before ** (gamma + 1) for gamma in self._gammas]

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Each average by its name, as weights by name of the parameter, on the CPU."""
        if self._summed:
            self._take_in()
        return self._by_name()

    def _by_name(self) -> dict[str, dict[str, Tensor]]:
        self._wait()
        return {
            own: {name: averages[i] for name, averages in self._averages.items()}
            for i, own in enumerate(self.names)
        }

    def release_device(self) -> None:
        """Keep nothing on another device than the CPU until the next update."""
        self._wait()
        self._sums = {name: t.to("cpu") for name, t in self._sums.items()}

    def clear(self) -> None:
        """Begin anew with the next update."""
        self._wait()
        if self._worker is not None:
            self._worker.shutdown()
        self._worker = None
        self.updates = self._summed = 0
        self._averages, self._sums = {}, {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Everything that :meth:`state_dict` holds of tensors, on the CPU."""
        return {**self._by_name(), "sum": {name: t.to("cpu") for name, t in self._sums.items()}}

    def numbers(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds beside tensors."""
        return {"widths": list(self.widths), "updates": self.updates, "summed": self._summed}

    def state_dict(self) -> dict[str, Any]:
        """Copies on the CPU."""
        parts = [{n: t.clone() for n, t in part.items()} for part in self.parts().values()]
        return {**self.numbers(), "averages": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: When it has other widths.
        """
        if tuple(state["widths"]) != self.widths:
            raise ValueError(
                f"The checkpoint's run has CollectConfig.power_averages={tuple(state['widths'])}, "
                f"but this callback has {self.widths}. Resume with the same."
            )
        self.clear()
        self.updates, self._summed = state["updates"], state["summed"]
        *averages, sums = state["averages"]
        self._averages = {name: [a[name].clone() for a in averages] for name in sums}
        self._sums = {name: t.clone() for name, t in sums.items()}


def _blend(averages: list[list[Tensor]], means: list[Tensor], shares: list[float]) -> None:
    for i, share in enumerate(shares):
        torch._foreach_lerp_([tensors[i] for tensors in averages], means, share)


def _copies(held: list[Tensor]) -> tuple[list[Tensor], Any]:
    """Copies in main memory, and an event that they are complete; ``None`` where they are now."""
    device = next((t.device for t in held if t.device.type != "cpu"), None)
    if device is None:
        return [t.clone() for t in held], None
    pinned = device.type == "cuda"
    copies = [torch.empty_like(t, device="cpu", pin_memory=pinned) for t in held]
    for copy, tensor in zip(copies, held, strict=True):
        copy.copy_(tensor, non_blocking=pinned)
    if not pinned:
        return copies, None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return copies, event

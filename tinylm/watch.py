"""What is out of the ordinary in a run: losses that leap, gradients that are not finite."""

from dataclasses import dataclass

SPIKE = 2.0  # nats above the usual loss
MEMORY = 0.98  # of the running mean that is the usual loss, what each step leaves
MOST_SKIPPED = 10  # steps in a row: the run is beyond help


@dataclass
class Watch:
    """Remembers what is usual. Part of every checkpoint."""

    usual_loss: float | None = None
    spiking: bool = False
    skipped: int = 0  # steps in a row
    last_skipped: int = -1

    def spike(self, loss: float) -> float | None:
        """The usual loss, if ``loss`` has just leapt above it."""
        usual = loss if self.usual_loss is None else self.usual_loss
        was, self.spiking = self.spiking, loss > usual + SPIKE
        self.usual_loss = MEMORY * usual + (1 - MEMORY) * loss
        return usual if self.spiking and not was else None

    def skip(self, step: int) -> bool:
        """Notes that ``step`` was not finite; whether it may be skipped like any before it."""
        self.skipped = self.skipped + 1 if step == self.last_skipped + 1 else 1
        self.last_skipped = step
        return self.skipped <= MOST_SKIPPED

    def skipped_until(self, step: int) -> int:
        """How many steps in a row were skipped, the last of them ``step``."""
        return self.skipped if self.last_skipped == step else 0

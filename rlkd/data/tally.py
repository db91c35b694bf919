"""Count what was seen, what is used and what was left out, and say it."""

from collections import Counter
from dataclasses import dataclass, field

SHOWN = 3  # names that a line lists


@dataclass
class Tally:
    """Things of one sort: `seen` is the sum of those that are used and those that were left out for a reason."""

    sort: str  # "rows", "files", "images"
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # number by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # some of them, by reason

    @property
    def seen(self) -> int:
        """Number of all."""
        return self.used + self.left_out.total()

    def use(self, number: int = 1) -> None:
        """Count things that are used."""
        self.used += number

    def leave_out(self, reason: str, name: str, number: int = 1) -> None:
        """Count things that are not used, with the reason and the name of one of them."""
        self.left_out[reason] += number
        names = self.examples.setdefault(reason, [])
        if len(names) < SHOWN:
            names.append(name)

    def move(self, reason: str, name: str, number: int) -> None:
        """Leave out things that were counted as used."""
        self.used -= number
        self.leave_out(reason, name, number)

    def lines(self) -> list[str]:
        """Return the lines to print: "600 files seen, 600 used", then a line for every reason."""
        lines = [f"{self.seen} {self.sort} seen, {self.used} used"]
        for reason, number in self.left_out.items():
            names = self.examples[reason]
            more = ", ..." if number > len(names) else ""
            lines.append(f"  left out: {number} {self.sort} {reason} ({', '.join(names)}{more})")
        return lines

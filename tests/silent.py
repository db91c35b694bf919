"""A progress report for tests that run whole experiments."""


class Silent:
    """Implement `rlkd.runs.folder.Progress` and report nothing."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Do nothing."""

    def advance(self, num_students: int) -> None:
        """Do nothing."""

    def figures(self, **values: float) -> None:
        """Do nothing."""

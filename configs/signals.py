"""Configuration of `rlkd signals`."""

from dataclasses import dataclass, field

from rlkd.data.rows import ColumnConfig
from rlkd.errors import UserError


@dataclass(frozen=True)
class SignalsConfig:
    """`rlkd signals`: a teacher's answers to data, as a folder of shards for `rlkd distil --teacher_signals`."""

    teacher: str
    """Folder or hub id of the teacher; with import_file or teacher_url its configuration and its tokenizer or image
    processor are enough."""
    data: str
    """Files or folder with the samples, as `rlkd distil` takes them."""
    top_k: int = 32
    """Likeliest tokens, or classes, of every position that are kept."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    import_file: str | None = None
    """Top-k log-probabilities that another tool stored: .safetensors or .parquet (docs/large.md has their form)."""
    teacher_url: str | None = None
    """Completion server that answers in place of the weights, as `rlkd distil` takes it."""
    teacher_served: str = ""
    """Name of the model at teacher_url, as `rlkd distil` takes it."""
    teacher_device_map: str | None = None
    """Devices that the teacher is spread over, as `rlkd distil` takes them."""
    device: str = "cpu"
    """Where the teacher answers."""
    batch_size: int = 8
    """Samples that it answers together."""
    allow_pickle: bool = False
    """Read weight files that are pickles, too; they can run code."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        self.columns.check()
        if self.top_k < 1 or self.batch_size < 1:
            raise UserError(f"top_k, batch_size: got {self.top_k} and {self.batch_size}; allowed: at least 1 each")
        if self.import_file is not None and self.teacher_url is not None:
            raise UserError("import_file, teacher_url: got both; allowed: one, where the answers come from")

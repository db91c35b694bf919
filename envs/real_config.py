"""Configure `rlkd distil` for a real model: models and data by name, training, cost and goal."""

from dataclasses import dataclass, field

from rlkd.cost.real_timing import BATCHES
from rlkd.data import Goal, Preference
from rlkd.data.rows import ColumnConfig
from rlkd.envs.guard import GuardConfig
from rlkd.envs.scenario import check_keep, check_sections
from rlkd.errors import UserError
from rlkd.hardware import load_hardware
from rlkd.losses import LossConfig
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.sides import Sources
from rlkd.students.real.causal import TokenConfig
from rlkd.students.real.train_config import ModuleTrainConfig
from rlkd.teachers.real.several import Weighting


@dataclass(frozen=True)
class RealCostConfig:
    """Where costs come from."""

    batch_size: int = 8
    """Samples that one inference answers together: the latency that the reward reads."""
    threads: int | None = None
    """CPU threads of one inference; by default those of the hardware profile, else 1."""
    batches: tuple[int, ...] | None = None
    """Further batch sizes that smaller copies of the student are timed at; more of them make a better fit. By default
    those of the hardware profile, else 1, 8 and 32."""
    profile: str | None = None
    """cost_profile.json of an earlier run of the same student: its speed is taken and nothing is timed."""

    def check(self) -> None:
        """Raise UserError for a batch without a sample, or no thread."""
        batches = list(self.batches or ())
        if self.batch_size < 1 or any(size < 1 for size in batches):
            raise UserError(f"cost: got batch_size {self.batch_size} and batches {batches}; allowed: at least 1 each")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"cost.threads: got {self.threads}; allowed: at least 1")


@dataclass(frozen=True)
class RealConfig:
    """`rlkd distil --data ...`: distil a real model. Control ranges come from the policy."""

    teacher: str
    """Folder of a transformers classifier or causal language model (config.json, safetensors, tokenizer or image
    processor), or a hub id."""
    data: str
    """A CSV, TSV, JSON lines, Parquet or .npz file, or a folder of such files named by split, or of images; for a
    language model .txt files, too. docs/data.md has the table of what is accepted."""
    student: str = ""
    """Folder or hub id of a model, or a JSON configuration (fresh weights); by default it is cut from the teacher."""
    teacher_device_map: str | None = None
    """Spread a teacher that fits on no single device: auto or balanced (accelerate), or a JSON file of module paths and
    devices, among them cpu and disk. Its signals are computed once, before any training."""
    teacher_shard: bool = False
    """Shard the teacher's weights over the processes of torchrun (FSDP2), which answer the batches in turns; it is not
    timed then. One process alone holds everything."""
    teacher_signals: str | None = None
    """Folder of rlkd signals with the teacher's answers; of `teacher`, its configuration and its tokenizer or image
    processor alone are read."""
    teacher_url: str | None = None
    """A completion server with log-probabilities of prompts that answers for a language model, such as vLLM's
    http://localhost:8000/v1; of `teacher`, its configuration and tokenizer alone are read. The environment variable
    RLKD_TEACHER_KEY may hold the server's key."""
    teacher_served: str = ""
    """Name of the model at teacher_url; by default the only one that it serves."""
    more_teachers: tuple[str, ...] = ()
    """Folders or hub ids of further classifiers of the same classes, of any architecture. Their answers are combined
    with those of `teacher` once, before any training; hidden features and attention come from `teacher`."""
    teacher_weights: Weighting = "mean"
    """mean; confidence: by how sure each teacher is of a training sample's label; gate: learned on the train split."""
    num_windows: int = 12
    """Decisions; each trains the student for train.steps_per_window steps."""
    cut: StudentCut = field(default_factory=StudentCut)
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    attach: AttachConfig = field(default_factory=AttachConfig)
    train: ModuleTrainConfig = field(default_factory=ModuleTrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    cost: RealCostConfig = field(default_factory=RealCostConfig)
    hardware: str = ""
    """Hardware profile (cpu, gpu, edge, or a YAML file): kept units are rounded up, so that layers have multiples of
    its channel_multiple, and its threads and batch sizes are those of the cost profile; by default they are not
    rounded."""
    goal: Goal = field(default_factory=Goal)
    preference: Preference = field(default_factory=Preference)
    guard: GuardConfig = field(default_factory=GuardConfig)
    keep_checkpoints: int = 2
    """States of the training that stay on the disk; with --resume it goes on from the last one that is whole."""
    allow_pickle: bool = False
    """Read weight files that are pickles, too; they can run code."""

    def sources(self) -> Sources:
        """Return the models, the data, and how the student is made of them."""
        return Sources(
            teacher=self.teacher,
            student=self.student,
            data=self.data,
            columns=self.columns,
            cut=self.cut,
            attach=self.attach,
            device_map=self.teacher_device_map,
            allow_pickle=self.allow_pickle,
        )

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        check_keep(self.keep_checkpoints)
        check_sections(self, "cut", "columns", "attach", "train", "loss", "tokens", "cost", "goal", "guard")
        self.goal.weights(self.preference)
        self.channel_multiple()
        needs_weights = self.more_teachers or self.teacher_device_map or self.tokens.teacher_in_memory
        if self.is_absent and (needs_weights or self.teacher_shard):
            raise UserError(
                "teacher_signals, teacher_url: got more_teachers, teacher_device_map, teacher_shard or "
                "tokens.teacher_in_memory, which need the teacher's weights; leave them out"
            )
        if self.teacher_shard and self.teacher_device_map is not None:
            raise UserError("teacher_shard, teacher_device_map: got both; allowed: one, for where the weights are")
        if self.teacher_signals is not None and self.teacher_url is not None:
            raise UserError("teacher_signals, teacher_url: got both; allowed: one, where the answers come from")
        if self.tokens.teacher_in_memory and self.teacher_device_map is not None:
            raise UserError(
                "tokens.teacher_in_memory: got a teacher with teacher_device_map, which answers once; leave one out"
            )

    @property
    def is_absent(self) -> bool:
        """Whether the teacher's answers come from elsewhere, so that its weights are not read."""
        return self.teacher_signals is not None or self.teacher_url is not None

    def timed(self) -> tuple[int, tuple[int, ...]]:
        """Return threads and further batch sizes of the cost profile: those given, else the hardware profile's.

        Raises:
            UserError: there is no such profile.
        """
        target = load_hardware(self.hardware) if self.hardware else None
        threads, batches = (1, BATCHES) if target is None else (target.threads, target.batch_sizes)
        cost = self.cost
        return cost.threads or threads, batches if cost.batches is None else cost.batches

    def channel_multiple(self) -> int:
        """Return the number of channels that layers of the target should have multiples of.

        Raises:
            UserError: there is no such profile.
        """
        return load_hardware(self.hardware).channel_multiple if self.hardware else 1

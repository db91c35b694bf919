"""`rlkd inspect-teacher`."""

from dataclasses import asdict
from pathlib import Path

from rlkd.cli.arguments import new_parser, parse
from rlkd.configs.knowledge import InspectConfig
from rlkd.io.records import write_json
from rlkd.runs.folder import use_one_thread
from rlkd.runs.inspect_teacher import RATIOS, inspect_teacher


def run(argv: list[str]) -> int:
    """Report on a teacher for a student; warnings do not change the exit code."""
    parser = new_parser(
        "inspect-teacher",
        "Report whether a teacher suits a student: accuracy, size, architecture, calibration, and what a student of "
        "this size can expect. It warns and never blocks.",
        ["--data digits", "--data fashion_mnist_8x8 --teacher.widths [512,256] --student.widths [32]"],
    )
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file to write the report to")
    config, options = parse(parser, argv, InspectConfig)
    assert config is not None
    use_one_thread()
    report = inspect_teacher(config)
    r = report
    print(f"teacher of {config.data}, on validation data")
    print(f"  accuracy      {r.teacher_accuracy:.3f} (threshold {r.threshold:g}, commonest class {r.chance:.3f})")
    print(
        f"  size          {r.size_ratio:.1f} times the student's parameters ({RATIOS[0]:g} to {RATIOS[1]:g} is usual)"
    )
    print(f"  architecture  {r.teacher_kind} teaches {r.student_kind}")
    print(f"  calibration   expected error of its confidence {r.teacher_ece:.3f}")
    print(
        f"a student of this size reached {r.expected_accuracy:.3f} ({r.expected_low:.3f} to {r.expected_high:.3f}) in "
        f"{config.num_students} trials of {config.num_windows} windows under the published setting"
    )
    warnings = report.warnings()
    for line in warnings:
        print(f"warning: {line}")
    if options.out:
        write_json(options.out, {**asdict(report), "warnings": warnings})
    return 0

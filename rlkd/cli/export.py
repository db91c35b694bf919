"""`rlkd export`."""

from pathlib import Path

from rlkd.cli.arguments import new_parser, parse
from rlkd.cli.verify import config_of_run
from rlkd.export import need_onnx
from rlkd.hardware import hardware_names, load_hardware
from rlkd.runs.folder import use_one_thread
from rlkd.runs.shipped import open_shipped


def run(argv: list[str]) -> int:
    """Export one student and print what was checked."""
    need_onnx()
    from rlkd.export.onnx_file import TOLERANCE
    from rlkd.runs.export import EXITS, TARGETS, ExportOptions, export_student

    parser = new_parser(
        "export",
        "Write a shipped student in the form that is deployed: ONNX, a program of torch.export, or a folder of "
        "transformers. It is compared with PyTorch on real samples, and refused where it differs.",
        [
            "runs/mine --to onnx",
            "runs/mine --to onnx --int8 --qat 400",
            "runs/mine --to onnx --triton models --name digits --hardware gpu",
            "runs/mine --to onnx --exits parts --exit_accuracy 0.95 --hardware edge",
            "runs/mine/student --data digits --to torch --out deployed",
        ],
    )
    parser.add_argument("student", type=Path, help="run folder of rlkd distil, or the folder of a student")
    parser.add_argument("--to", type=str, default="onnx", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path | None, default=None, help="by default export/TO beside the student")
    text = "both, if (an ONNX If, which stops early once all of a batch left) or parts (each sample leaves on its own)"
    parser.add_argument("--exits", type=str, default=EXITS[0], help=text)
    text = "choose the exit threshold on validation: the lowest with this accuracy"
    parser.add_argument("--exit_accuracy", type=float | None, default=None, help=text)
    text = (
        "choose it on validation: the most accurate one at which a sample takes this long in the mean, such as 0.7 or "
    )
    text += "2x of the time without early exits, or 300us"
    parser.add_argument("--exit_latency", type=str | None, default=None, help=text)
    text = "largest difference of a logit to PyTorch that is accepted"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=text)
    parser.add_argument("--triton", type=Path | None, default=None, help="also write a Triton model repository there")
    parser.add_argument("--name", type=str, default="student", help="of the model in the Triton repository")
    text = "also quantise after the training; a step that loses more than --most_lost is taken back"
    parser.add_argument("--int8", action="store_true", help=text)
    text = "with --int8: also distil on the integer grid for so many steps (chains and classifiers); 0: do not"
    parser.add_argument("--qat", type=int, default=0, help=text)
    text = "points of accuracy on validation that int8 may lose"
    parser.add_argument("--most_lost", type=float, default=0.5, help=text)
    text = f"the target: {', '.join(hardware_names())}, or a YAML file"
    parser.add_argument("--hardware", type=str, default="cpu", help=text)
    text = "data set or path of data to check with; by default that of the run"
    parser.add_argument("--data", type=str | None, default=None, help=text)
    _, options = parse(parser, argv)
    wanted = ExportOptions(
        to=options.to,
        hardware=load_hardware(options.hardware),
        exits=options.exits,
        exit_accuracy=options.exit_accuracy,
        exit_latency=options.exit_latency,
        tolerance=options.tolerance,
        triton=options.triton,
        name=options.name,
        int8=options.int8,
        most_lost=options.most_lost,
        aware_steps=options.qat,
    )
    wanted.check()
    use_one_thread()
    opened = open_shipped(Path(options.student), config_of_run, options.data)
    out = options.out or opened.folder.parent / "export" / options.to
    export_student(opened, wanted, out, print)
    print(f"exported: {out}")
    return 0

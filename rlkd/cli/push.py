"""`rlkd push`."""

from pathlib import Path

from rlkd.cli.arguments import new_parser, parse
from rlkd.runs.hub import push


def run(argv: list[str]) -> int:
    """Upload a policy or a student to the Hugging Face hub."""
    parser = new_parser(
        "push",
        "Upload a policy or a student with a model card to the Hugging Face hub: JSON, safetensors and text alone.",
        ["--folder runs/first --repo me/my-policy", "--folder runs/mine/student --repo me/my-student --private true"],
    )
    parser.add_argument("--folder", type=Path, required=True, help="a run folder, or that of a student or a policy")
    parser.add_argument("--repo", type=str, required=True, help="OWNER/NAME; made where it does not exist")
    parser.add_argument("--private", type=bool, default=False, help="whether a new repository is private")
    _, options = parse(parser, argv)
    print(push(options.folder, options.repo, private=options.private))
    return 0

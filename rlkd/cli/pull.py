"""`rlkd pull`."""

from pathlib import Path

from rlkd.cli.arguments import new_parser, parse
from rlkd.runs.hub import pull


def run(argv: list[str]) -> int:
    """Download a policy or a student from the Hugging Face hub."""
    parser = new_parser(
        "pull",
        "Download a policy or a student from the Hugging Face hub and check it; no code of it runs.",
        ["--repo me/my-policy --out my-policy"],
    )
    parser.add_argument("--repo", type=str, required=True, help="OWNER/NAME")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--revision", type=str | None, default=None, help="a commit, branch or tag")
    _, options = parse(parser, argv)
    what = pull(options.repo, options.out, options.revision)
    after = f"rlkd distil --policy {options.out}" if what == "policy" else f"rlkd.load_student({str(options.out)!r})"
    print(f"{what} in {options.out}; use it: {after}")
    return 0

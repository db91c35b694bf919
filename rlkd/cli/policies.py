"""`rlkd policies`."""

from rlkd.agents.policy.bundled import CARD, bundled_policies
from rlkd.cli.arguments import new_parser, parse
from rlkd.io.files import MAX_JSON_BYTES, inside, read_bytes


def run(argv: list[str]) -> int:
    """Print the policies that come with rlkd, each with its card."""
    parse(new_parser("policies", "List the policies that come with rlkd, with their cards.", [""]), argv)
    found = bundled_policies()
    if not found:
        print("this installation of rlkd holds no policy; rlkd train makes one")
    for name, folder in found.items():
        has_text = (folder / "README.md").is_file()
        card = read_bytes(inside(folder, "README.md" if has_text else CARD), MAX_JSON_BYTES).decode(errors="replace")
        print(f"{name}: {folder}\n")
        print("".join(c if c.isprintable() or c == "\n" else " " for c in card).strip() + "\n")
    return 0

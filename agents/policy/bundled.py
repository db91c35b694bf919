"""Policies that come with the package, and where a command's policy is."""

from importlib import resources
from pathlib import Path

from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.errors import UserError

DEFAULT = "default"
CARD = "bundle.json"


def bundled_policies() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    place = Path(str(resources.files("rlkd"))) / "policies"
    if not place.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(place.iterdir()) if (folder / CARD).is_file()}


def find_policy(given: Path | None) -> Bundle:
    """Load the policy in `given`, or in the folder `policy` of the run `given`, or by default the one of the package.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if given is None:
        found = bundled_policies().get(DEFAULT)
        if found is None:
            raise UserError(
                "--policy: this installation of rlkd holds no policy of its own; give a run folder of rlkd train, or "
                "its folder policy"
            )
        return load_bundle(found)
    inside = given / "policy"
    return load_bundle(inside if not (given / CARD).exists() and inside.is_dir() else given)

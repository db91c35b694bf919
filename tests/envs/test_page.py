from pathlib import Path

from rlkd.envs import DistillationEnv
from rlkd.envs.action import CONTROLS
from rlkd.envs.observation import HIGH, LOW, OBSERVATIONS
from rlkd.envs.page import action_table, observation_table, page

PAGE = Path(__file__).parent.parent.parent / "docs" / "environment.md"


def test_the_page_and_the_docstring_are_made_from_the_tables() -> None:
    assert PAGE.read_text() == page(), (
        "write it anew: python -c 'from rlkd.envs.page import page; print(page(), end=\"\")'"
    )
    assert page() in (DistillationEnv.__doc__ or "")


def test_every_action_and_observation_has_a_row_with_its_bounds() -> None:
    actions, observations = action_table().splitlines()[2:], observation_table().splitlines()[2:]
    assert [row.split("|")[3].strip(" `") for row in actions] == list(CONTROLS)
    assert [row.split("|")[2].strip(" `") for row in observations] == list(OBSERVATIONS)
    bounds = [row.split("|")[3].strip() for row in observations]
    assert bounds == [f"{low:g} to {high:g}" for low, high in zip(LOW.tolist(), HIGH.tolist(), strict=True)]

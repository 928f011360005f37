"""Names and who answers to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfront.data import DATASETS
from bitfront.errors import UnknownNameError
from bitfront.formats import FORMATS
from bitfront.metrics import RUNNERS
from bitfront.models import MODELS
from bitfront.operations import OPERATIONS
from bitfront.registry import Registry, canonical
from bitfront.spaces import SPACES
from bitfront.strategies import STRATEGIES

ROOMS = [DATASETS, FORMATS, OPERATIONS, RUNNERS, MODELS, SPACES, STRATEGIES]


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """A package with two members, as a third party would lay it out; (registry, folder)."""
    folder = tmp_path / "bench_room"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from bitfront.registry import Registry\nROOM = Registry('chair', 'bench_room')\n"
    )
    member = "from bench_room import ROOM\n@ROOM.register({names})\nclass Member:\n    '''{doc}\n\n    More.'''\n"
    (folder / "one.py").write_text(member.format(names="'Arm_Chair', 'fauteuil'", doc="Has arms."))
    (folder / "two.py").write_text(member.format(names="'stool'", doc="Has three legs."))
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    yield importlib.import_module("bench_room").ROOM, folder, member
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == "bench_room"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "spelling", ["Arm_Chair", "arm-chair", "armchair", "ARM CHAIR", "ArmChair", "fauteuil", "Fauteuil"]
)
def test_names_are_forgiving(rooms, spelling):
    room = rooms[0]
    assert room.official(spelling) == "Arm_Chair"
    assert room.get(spelling) is room.get("Arm_Chair")
    assert spelling in room


def test_a_new_file_is_a_new_member_and_its_first_docstring_line_is_what_is_listed(rooms):
    room = rooms[0]
    assert room.names() == ["Arm_Chair", "stool"]
    assert room.described() == [("Arm_Chair", "Has arms."), ("stool", "Has three legs.")]


def test_two_members_of_one_name_are_an_error_naming_both_files(rooms):
    room, folder, member = rooms
    (folder / "zz.py").write_text(member.format(names="'arm-chair'", doc="Too."))
    with pytest.raises(ValueError, match="two chairs are called 'arm-chair'") as caught:
        room.names()
    assert f"{folder}/one.py" in str(caught.value)
    assert f"{folder}/zz.py" in str(caught.value)


@pytest.mark.parametrize("names", ["'sofa', 'fauteuil'", "'fauteuil'", "'stool'"])
def test_an_alias_cannot_be_taken_by_another_either(rooms, names):
    room, folder, member = rooms
    (folder / "zz.py").write_text(member.format(names=names, doc="Too."))
    with pytest.raises(ValueError, match="two chairs are called"):
        room.names()


def test_a_member_has_a_name(rooms):
    room = rooms[0]
    assert room.name_of(room.get("fauteuil")) == "Arm_Chair"

    class Sofa:
        pass

    with pytest.raises(UnknownNameError, match=r"the chair '.*Sofa' \(.*test_registry.py\) is not registered"):
        room.name_of(Sofa)


def test_an_unknown_name_is_answered_with_all_and_the_nearest(rooms):
    room = rooms[0]
    with pytest.raises(
        UnknownNameError, match=r"there is no chair called 'stol'; allowed: Arm_Chair, stool. Did you mean 'stool'\?"
    ):
        room.get("stol")
    assert "sofa" not in room
    assert 3 not in room


@pytest.mark.parametrize("room", ROOMS, ids=lambda r: r.kind)
def test_every_member_of_every_room_says_what_it_is(room):
    assert room.names()
    for name, line in room.described():
        assert line.endswith("."), f"{room.kind} {name}: {line!r}"
        assert room.official(name) == name


def test_a_room_that_does_not_exist_fails_at_the_first_look_and_not_before():
    room = Registry("thing", "bitfront.no_such_room")
    with pytest.raises(ModuleNotFoundError):
        room.names()


@given(st.text(max_size=12))
def test_the_form_in_which_names_are_compared_is_stable(name):
    assert canonical(canonical(name)) == canonical(name) == canonical(f"_{name}- ")

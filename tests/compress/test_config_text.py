"""config.json is edited as text: keys that are not meant keep every byte."""

import json

import pytest

from moestro.compress import PlanError
from moestro.compress.config_text import edited

LAID_OUT = '{\n  "a": {"num": 8, "x": [1, 2]},\n  "num": 8,\n  "rope_theta": 1e6,\n  "name": "num \\"8\\""\n}\n'


def test_only_the_value_changes():
    assert edited(LAID_OUT, {"num": 6}) == LAID_OUT.replace('"num": 8,\n', '"num": 6,\n')
    assert edited(LAID_OUT, {"num": 8}) == LAID_OUT
    assert edited(LAID_OUT, {"a": None, "name": "x"}) == LAID_OUT.replace('{"num": 8, "x": [1, 2]}', "null").replace(
        '"num \\"8\\""', '"x"'
    )


def test_new_keys_stand_behind_the_last_one_in_its_layout():
    assert edited(LAID_OUT, {"new": [6, 8]}) == LAID_OUT.replace('8\\""\n', '8\\"",\n  "new": [6, 8]\n')
    for text, want in (("{}", '{"k": 1}'), ('{"a":1}', '{"a":1, "k": 1}'), (' { "a":1 } ', ' { "a":1, "k": 1 } ')):
        assert edited(text, {"k": 1}) == want and json.loads(want)["k"] == 1


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a" 1}', '{"a": 1, "a": 2}', '{"a": }'])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(PlanError, match="config.json"):
        edited(text, {"k": 1})

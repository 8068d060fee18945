"""`--policy`: names, parameters, JSON and outside files; and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from policies.__main__ import explain, list_policies
from policies.contract import Policy
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.heterospec import HeteroSpec
from policies.registry import all_policies, from_json, load_policy
from policies.static import Static
from tests.policies.cases import settings

OUTSIDE = '''
from __future__ import annotations
from policies.eagle3 import Eagle3
from policies.registry import policy

@policy("{name}", paper="")
class Mine(Eagle3):
    """An EAGLE-3 of one's own."""
    patience: float | None = None
'''


@pytest.mark.parametrize("spec", settings())
def test_json_round_trip(spec, tmp_path):
    policy = load_policy(spec)
    text = json.dumps(policy.to_json() | {"fit": {"seed": 0}})  # what sim.fit adds is not a parameter
    assert from_json(json.loads(text)) == policy
    (tmp_path / "p.json").write_text(text)
    assert load_policy(str(tmp_path / "p.json")) == policy


@pytest.mark.parametrize("spec", [spec for spec in settings() if "_=" not in spec])
def test_spec_round_trip(spec):
    assert load_policy(load_policy(spec).spec()) == load_policy(spec)


def test_every_policy_says_what_it_is():
    listed, known = list_policies(), all_policies()
    assert set(known) >= {"autoregressive", "chain", "static", "eagle3", "heterospec"}
    for name, cls in known.items():
        assert cls.__doc__ and cls.name == name and f"{name}  [" in listed
        assert name in explain(name)


def test_parameters():
    assert load_policy(" eagle3(total_tokens=24, depth=5) ") == Eagle3(24, 5)
    assert load_policy("static(tree=medusa)") == Static("medusa")
    assert load_policy("static(tree=[[0], [0, 0]])") == Static(((0,), (0, 0)))
    wanted = HeteroSpec(gamma=(0.0, 1.0, 1.0), extend=False)
    assert load_policy("heterospec(gamma=(0, 1, 1), alpha=none, extend=False)") == wanted
    assert isinstance(load_policy("heterospec(gamma=(0, 1, 1))").gamma[0], float)


def test_parameters_on_top_of_a_file(tmp_path):
    fitted = HeteroSpec(thresholds_=(1.0, 2.0))
    (tmp_path / "h.json").write_text(json.dumps(fitted.to_json()))
    assert load_policy(f"{tmp_path / 'h.json'}(extend=False)") == HeteroSpec(extend=False, thresholds_=(1.0, 2.0))
    folder = tmp_path / "copy (1)"
    folder.mkdir()
    (tmp_path / "h.json").rename(folder / "h.json")
    assert load_policy(f"{folder / 'h.json'}(extend=False)") == HeteroSpec(extend=False, thresholds_=(1.0, 2.0))


@pytest.mark.parametrize(
    "spec, told",
    [
        ("eagel3", "unknown policy 'eagel3': did you mean eagle3?"),
        ("zzz", "known are "),
        ("eagle3(total_tokens=60", "write name(parameter=value, ...), with a bracket at the end"),
        ("mine.py", "of a Python file say which class, FILE.py:Class"),
        ("eagle3(total_token=3)", "did you mean total_tokens?"),
        ("autoregressive(k=3)", "has no parameter 'k'"),
        ("eagle3(depth=0)", "depth must be 1 or more, not 0"),
        ("eagle3(depth=-1)", "depth must be 1 or more"),
        ("eagle3(top_k=2.5)", "top_k must be of type int"),
        ("eagle3(top_k=True)", "top_k must be of type int"),
        ("eagle3(top_k=ten)", "top_k must be of type int"),
        ("chain(k=-1)", "k must be 0 or more"),
        ("static(tree=oak)", "eagle1 or medusa"),
        ("static(tree=[[0, 0]])", "has no parent"),
        ("static(tree=[[999999999]])", "ranks below"),
        ("static(tree=[{'a': 1}])", "list of non-empty paths"),
        ("static(tree=[0, 1])", "list of non-empty paths"),
        ("static(tree=[])", "list of non-empty paths"),
        ("heterospec(confidence=globl)", "confidence must be cumulative or local"),
        ("heterospec(criterion=gini)", "criterion must be cart or paper"),
        ("heterospec(first_index=2)", "first_index must be 0 or 1"),
        ("heterospec(gamma=(0.3, high))", "cannot read"),
        ("heterospec(gamma=(0.3, 'high'))", "gamma[1] must be of type float"),
        ("heterospec(gamma=(-0.3, 1))", "gamma must hold numbers from 0 up"),
        ("heterospec(thresholds_=(2.0, 1.0))", "ascending"),
        ("heterospec(minimum_samples=0)", "minimum_samples must be 1 or more"),
        ("chain(k=1) (k=2)", "cannot read"),
        ("chain(k=1, k=2)", "twice"),
        ("chain)", "cannot read"),
        ("chain(3)", "cannot read"),
        ("chain(k=)", "cannot read"),
        ("chain(**{})", "cannot read"),
        ("chain(k={[]: 1})", "cannot read"),
        ("none.json", "does not exist"),
        ("none.py:Mine", "does not exist"),
        ("", "unknown policy ''"),
    ],
)
def test_bad_specs(spec, told):
    with pytest.raises(UserError) as error:
        load_policy(spec)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "names none under the key 'policy'"),
        ('{"policy": ["eagle3"]}', "names none under the key 'policy'"),
        ('{"policy": "eagel3"}', "did you mean eagle3?"),
        ('{"policy": "eagle3", "parameters": [1]}', "must be an object"),
        ('{"policy": "eagle3", "parameters": {"depth": "8"}}', "depth must be of type int"),
        ('{"policy": "eagle3", "parameters": {"dpeth": 8}}', "did you mean depth?"),
        ('{"policy": "heterospec", "parameters": {"thresholds_": [NaN]}}', "finite"),
        ('{"policy": "heterospec", "parameters": {"thresholds_": ["a"]}}', "thresholds_[0] must be of type float"),
    ],
)
def test_bad_json(content, told, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_policy(str(path))
    assert told in str(error.value) and "bad.json" in str(error.value)


def test_a_folder_is_not_a_policy(tmp_path):
    (tmp_path / "p.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(str(tmp_path / "p.json"))


def test_unfitted():
    with pytest.raises(UserError, match=r"must be fitted first: run `python -m sim.fit TRACE --policy heterospec"):
        load_policy("heterospec").check_fitted()
    load_policy("heterospec(thresholds_=())").check_fitted()


def test_a_class_from_outside(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE.format(name="mine"))
    policy = load_policy(f"{path}:Mine(depth=3, patience=2)")
    assert (policy.depth, policy.patience, policy.total_tokens) == (3, 2.0, 60)
    assert from_json(json.loads(json.dumps(policy.to_json()))).parameters() == policy.parameters()
    assert str(path) in policy.to_json()["policy"]


def test_an_outside_class_replaces_nothing(tmp_path):
    path = tmp_path / "eagle3.py"
    path.write_text(OUTSIDE.format(name="eagle3"))
    load_policy(f"{path}:Mine")
    assert type(load_policy("eagle3")) is Eagle3 and all_policies()["eagle3"] is Eagle3
    assert Eagle3().to_json()["policy"] == "eagle3"


def test_what_an_outside_file_imports_first_stays_registered(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE.format(name="mine"))
    code = f"from policies.registry import load_policy\nload_policy({f'{path}:Mine'!r})\nload_policy('eagle3')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)  # where nothing is imported yet


@pytest.mark.parametrize(
    "code, name, told",
    [
        ("x = 1", "Mine", "has no policy class 'Mine'"),
        ("class Mine: pass", "Mine", "has no policy class 'Mine'"),
        ("import nothing_of_this_name", "Mine", "cannot be imported (ModuleNotFoundError"),
        ("def", "Mine", "cannot be imported (SyntaxError"),
    ],
)
def test_bad_outside_files(code, name, told, tmp_path):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError) as error:
        load_policy(f"{tmp_path / 'bad.py'}:{name}")
    assert told in str(error.value)


def test_nothing_to_fit():
    with pytest.raises(UserError, match="nothing to fit"):
        Eagle3().fit(None)
    assert Policy.fit is Eagle3.fit


def test_help_is_quick():
    """`--help` imports neither torch nor scipy."""
    for module in ("policies", "sim.fit"):
        code = "import runpy, sys; sys.argv = ['x', '--help']\n"
        code += f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        code += "except SystemExit: pass\nassert not {'torch', 'scipy', 'sklearn'} & set(sys.modules)"
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)

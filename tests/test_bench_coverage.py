"""The benchmark of an estimate's coverage: what it makes of a folder of something else. Nothing is measured here."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "bench" / "coverage.py"


@pytest.mark.parametrize(
    "changed, said", [({"p": 101}, "p is 101 there, 97 here"), ({"unknown": 1}, "unknown")]
)
def test_a_folder_of_another_run_is_refused_in_one_line(changed, said, tmp_path):
    spec = importlib.util.spec_from_file_location("coverage", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(module.CONFIG) | changed))
    with pytest.raises(SystemExit, match="expected an empty folder, or one of this benchmark") as error:
        module.stages(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and "--force" not in str(error.value)

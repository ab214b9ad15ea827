"""How the project is installed: editable, from the repository's root, and as a wheel in an empty folder."""

import ast
import importlib.util
import os
import pathlib
import re
import shutil
import site
import subprocess
import sys
import textwrap
import tomllib

import pytest

import calrec_jax

ROOT = pathlib.Path(calrec_jax.__file__).parents[1]
TRAVELS = (
    "calrec_jax",
    "gin",
    "tasks",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
)

FINDS_ITS_FILES = """
    import importlib.util, pathlib, sys
    import gin
    assert hasattr(gin, "parse_config"), gin  # the library, not a folder
    assert importlib.util.find_spec("tasks") is None, "a top-level `tasks` is visible"
    import calrec_jax
    from calrec_jax import config
    home = pathlib.Path(calrec_jax.__file__).parent
    print(home)
    for file in ("runs/quickstart.gin", "models/tiny.gin", "datasets/shop.gin"):
        assert (config.PACKAGED / file).is_file(), file
    assert not list(config.PACKAGED.rglob("*.py")), "gin_configs holds no Python"
    assert pathlib.Path(importlib.util.find_spec("calrec_jax.tasks").origin).is_relative_to(home)
    assert list((home / "evaluate").rglob("*.html")) and list((home / "evaluate").rglob("*.css"))
"""


def python(code, interpreter=sys.executable, cwd=None):
    done = subprocess.run(
        [interpreter, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    return {**kept, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in TRAVELS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), "."], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A new virtual environment with the wheel, which sees the libraries of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return interpreter, packages


def test_wheel_brings_one_package_and_all_its_files(fresh):
    _, packages = fresh
    names = {path.name for path in packages.iterdir() if not path.name.endswith((".pth", ".dist-info"))}
    assert names <= {"calrec_jax", "__pycache__"}
    for file in (ROOT / "gin").rglob("*.gin"):
        assert (packages / "calrec_jax" / "gin_configs" / file.relative_to(ROOT / "gin")).is_file(), file
    modules = {path.relative_to(ROOT) for path in (ROOT / "calrec_jax").rglob("*.py")}
    missing = {module for module in modules if not (packages / module).is_file()}
    assert not missing
    assert (packages / "calrec_jax" / "py.typed").is_file()


def test_wheel_works_from_an_empty_folder(fresh, tmp_path):
    interpreter, packages = fresh
    assert python(FINDS_ITS_FILES, interpreter, tmp_path) == str(packages / "calrec_jax")


def test_wheel_runs_a_packaged_run_file_from_an_empty_folder(fresh, tmp_path):
    interpreter, _ = fresh
    command = [interpreter.parent / "calrec", "vocab", "--gin_file=runs/quickstart.gin", "--run_dir=here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1
    assert done.stderr.startswith("calrec: error: dataset here/datasets/Home_and_Kitchen does not exist"), done.stderr


def test_from_the_repository_root():
    assert python(FINDS_ITS_FILES.replace('importlib.util.find_spec("tasks") is None', "True"), cwd=ROOT)


def test_editable_install_from_an_empty_folder(tmp_path):
    if importlib.util.find_spec("__editable___calrec_jax_0_1_0_finder") is None:
        pytest.skip("calrec_jax is not installed editable here")
    assert python(FINDS_ITS_FILES, cwd=tmp_path) == str(ROOT / "calrec_jax")


def test_the_version_is_told_once():
    (in_setup,) = re.findall(r'^VERSION = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert calrec_jax.__version__ == in_setup
    assert f"\n## {in_setup}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_are_relative_and_committed():
    for link, target in (("gin_configs", "../gin"), ("tasks", "../tasks")):
        assert os.readlink(ROOT / "calrec_jax" / link) == target
    assert not list((ROOT / "gin").rglob("*.py"))


ROOMS = """
    actions artifacts beside_line cli config layout losses pipeline quickstart run_settings timing tokenizer verbs
    data.dataset data.examples data.packing data.prepare data.shop
    models.transformer train.loop decode.run rank.run evaluate.run evaluate.report
    export.run export.functions export.card export.jax_format export.t5x_format
"""


def test_rooms_import_without_tensorflow(tmp_path):
    imports = "\n".join(f"import calrec_jax.{room}" for room in ROOMS.split())
    names = '{"tensorflow", "seqio", "tensorflow_text", "t5x", "torch"}'
    python(f"{imports}\nimport sys\nloaded = {names} & set(sys.modules)\nassert not loaded, loaded", cwd=tmp_path)


def test_t5x_is_imported_in_one_place():
    importers = {
        path.relative_to(ROOT).as_posix()
        for folder in ("calrec_jax", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import t5x|from t5x|from calrec_jax.integrations(\.| import )t5x)", path.read_text(), re.M)
    }
    assert importers == {"calrec_jax/integrations/t5x.py"}


def setup_lists():
    """The literal lists of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in assignments
        if node.targets[0].id in ("INSTALL_REQUIRES", "EXTRAS")
    }


def name_of(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower().replace("_", "-")


def test_every_dependency_is_locked_and_explained():
    lists = setup_lists()
    names = {name_of(line) for line in lists["INSTALL_REQUIRES"]}
    extras = {name_of(line) for extra, lines in lists["EXTRAS"].items() if extra != "t5x" for line in lines}
    constraints = (ROOT / "constraints.txt").read_text()
    assert names | extras <= {name_of(line) for line in constraints.splitlines()}
    assert "://" not in constraints and "@" not in constraints, "names and versions only"
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    for name in sorted(names | extras | {"t5x"}):
        assert f"`{name}`" in explained, f"docs/dependencies.md has no line about {name}"


IMPORTED_AS = {
    "gin-config": "gin",
    "ibis-framework": "ibis",
    "orbax-checkpoint": "orbax",
    "tensorboardx": "tensorboardX",
}


def test_what_is_installed_is_imported_somewhere():
    code = "\n".join(path.read_text() for path in (ROOT / "calrec_jax").rglob("*.py"))
    for requirement in map(name_of, setup_lists()["INSTALL_REQUIRES"]):
        module = IMPORTED_AS.get(requirement, requirement)
        assert re.search(rf"^\s*(import|from) {module}\b", code, re.MULTILINE), f"nothing imports {requirement}"


def test_python_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["mypy"]["python_version"] == "3.11"
    assert 'python_requires=">=3.11,<3.14"' in (ROOT / "setup.py").read_text()

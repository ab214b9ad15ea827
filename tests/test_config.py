"""Gin files and flags: what is found, what overrides what, and each mistake by its message."""

import gin
import pytest

from calrec_jax import config
from calrec_jax.errors import CalrecError


@gin.configurable("config_probe")
def probe(rate=1, name="none", inner=None):
    return rate, name, inner


@gin.configurable("config_probe_inner")
def inner(width=2):
    return width


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def load(tmp_path):
    def load(text, *bindings, **arguments):
        path = tmp_path / "run.gin"
        path.write_text(text)
        return config.load([str(path)], bindings, modules=(), **arguments)

    return load


def test_macros_bindings_and_flags(load):
    load("RATE = 3\nconfig_probe.rate = %RATE\nconfig_probe.name = 'file'\n")
    assert probe() == (3, "file", None)
    load("RATE = 3\nconfig_probe.rate = %RATE\nconfig_probe.name = 'file'\n", "RATE=5", "config_probe.name='flag'")
    assert probe() == (5, "flag", None)
    load("config_probe:\n  rate = 4\n")
    assert probe() == (4, "none", None), "a configuration replaces the one before it"


def test_later_files_override(tmp_path):
    (tmp_path / "a.gin").write_text("config_probe.rate = 1\nconfig_probe.name = 'a'\n")
    (tmp_path / "b.gin").write_text("config_probe.rate = 2\n")
    config.load([str(tmp_path / "a.gin"), str(tmp_path / "b.gin")], modules=())
    assert probe() == (2, "a", None)


def test_an_include_stands_where_it_is_written(tmp_path, load, caplog):
    (tmp_path / "common.gin").write_text("config_probe.rate = 1\nconfig_probe.name = 'common'\n")
    load(
        "config_probe.rate = 0\n# one\u2028line\ninclude 'common.gin'\nconfig_probe.name = 'run'\n",
        search_paths=[str(tmp_path)],
    )
    assert probe() == (1, "run", None)
    with pytest.raises(CalrecError, match=r"In .*run.gin line 2"):
        load("include 'common.gin'\nconfig_probe.inner = @nothing_here()\n", search_paths=[str(tmp_path)])
    assert caplog.text == ""


def test_scopes_and_references(load):
    loaded = load(
        "stage1/config_probe.rate = 8\n"
        "config_probe.inner = @wide/config_probe_inner()\n"
        "wide/config_probe_inner.width = 9\n"
    )
    assert probe() == (1, "none", 9)
    with gin.config_scope("stage1"):
        assert probe() == (8, "none", 9)
    loaded.check_scopes(["stage1"])
    with pytest.raises(CalrecError, match=r"run\.gin:1: nothing uses the scope stage1/; did you mean stage2\?"):
        loaded.check_scopes(["stage2"])


def test_search_paths(tmp_path, monkeypatch):
    for name, rate in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "common.gin").write_text(f"config_probe.rate = {rate}\n")
        (tmp_path / name / "run.gin").write_text("include 'common.gin'\n")
    monkeypatch.chdir(tmp_path)
    for order, expected in ((["first", "second"], 1), (["second", "first"], 2), (["first", "second"], 1)):
        config.load(["run.gin"], search_paths=order, modules=())
        assert probe()[0] == expected, order
    config.load(["second/run.gin"], search_paths=["first"], modules=())
    assert probe()[0] == 1, "includes are sought under the search paths, not beside the file, as gin does"


def test_bindings_of_what_needs_tensorflow_are_passed_over(load):
    assert config.TENSORFLOW_CONFIGURABLES == ("eval_tasks",)
    # Another name: a test before this one may have imported what registers eval_tasks.
    load("not_imported.task = 'x'\nconfig_probe.rate = 2\n", skip=("not_imported",))
    assert probe()[0] == 2
    with pytest.raises(CalrecError, match="there is no not_imported to configure"):
        load("not_imported.task = 'x'\n", skip=())


@pytest.mark.parametrize(
    ("text", "bindings", "message"),
    [
        (
            "RATE=1\nconfig_probe.rate=%RATE\n",
            ["RATTE=2"],
            r"--gin.RATTE=2: nothing uses the macro RATTE; did you mean RATE\?",
        ),
        ("RATE=1\n", [], r"run.gin:1: nothing uses the macro RATE"),
        ("\nconfig_probe.rate=%RATE\n", [], r"run.gin:2: nothing sets the macro RATE; set it by --gin.RATE=…"),
        (
            "RATE=%gin.REQUIRED\nconfig_probe.rate=%RATE\n",
            [],
            r"run.gin:1: the macro RATE must be set: --gin.RATE=…",
        ),
        (
            "RUN_DIR=%gin.REQUIRED\nconfig_probe.name=%RUN_DIR\n",
            [],
            r"run.gin:1: the macro RUN_DIR must be set: --run_dir=DIR",
        ),
        (
            "A=%gin.REQUIRED\nB=%gin.REQUIRED\nconfig_probe.name=[%A, {'x': %B}]\n",
            [],
            r"the macros A, B must be set: --gin.A=… --gin.B=…",
        ),
        ("config_probe.ratte=1\n", [], r"run.gin:1: config_probe has no setting ratte; did you mean rate\?"),
        ("config_prob.rate=1\n", [], r"run.gin:1: there is no config_prob to configure; did you mean config_probe"),
        ("config_probe.inner=@nothing_here()\n", [], r"No configurable matching reference '@nothing_here\(\)'"),
        ("import os\n", [], r"run.gin:1: only modules of calrec_jax can be imported, not os"),
        ("from os import path\n", [], r"only modules of calrec_jax can be imported, not os.path"),
        ("config_probe.rate = __import__('os')\n", [], r"run.gin: line 1: Failed to parse token '__import__'"),
        ("config_probe.rate = (3\n", [], r"run.gin: .*EOF in multi-line statement"),
        ("config_probe.rate 3\n", [], r"run.gin: line 1: Couldn't parse statement"),
        ("include 'none.gin'\n", [], r"run.gin:1: none.gin is not there"),
        (
            "config_probe.name='x'\n",
            ["config_probe.name=x"],
            r"a text needs quotes of its own, as in --gin.NAME='\"text\"'",
        ),
    ],
)
def test_mistakes(load, text, bindings, message):
    with pytest.raises(CalrecError, match=message) as caught:
        load(text, *bindings)
    assert "\n" not in str(caught.value)


def test_an_import_of_ours_is_fine(load):
    load("import calrec_jax.layout\nconfig_probe.rate = 2\n")
    assert probe()[0] == 2


def test_a_required_macro_that_is_set(load):
    load("RATE=%gin.REQUIRED\nconfig_probe.rate=%RATE\n", "RATE=6")
    assert probe()[0] == 6


def test_files_that_cannot_be_read(tmp_path, load):
    with pytest.raises(
        CalrecError, match=r"--gin_file: runs/quikstart.gin is not there.*did you mean runs/quickstart.gin"
    ):
        config.load(["runs/quikstart.gin"], modules=())
    with pytest.raises(CalrecError, match=r"is a folder, not a file"):
        config.load([str(tmp_path)], modules=())
    (tmp_path / "latin.gin").write_bytes(b"# caf\xe9\n")
    with pytest.raises(CalrecError, match=r"cannot read .*latin.gin"):
        config.load([str(tmp_path / "latin.gin")], modules=())
    with pytest.raises(CalrecError, match="run.gin includes itself"):
        load(f"include '{tmp_path}/run.gin'\n")


def test_settings_that_the_caller_passes_are_refused(load):
    loaded = load("config_probe.rate = 2\n")
    loaded.check_not_bound("config_probe", ["name"], "so be it")
    with pytest.raises(CalrecError, match=r"run.gin:1: config_probe.rate has no effect: so be it"):
        loaded.check_not_bound("config_probe", ["rate"], "so be it")


def test_a_reference_to_the_library_and_not_to_the_folder():
    assert "site-packages" in gin.__file__
    assert not (config.PACKAGED / "__init__.py").exists()


@pytest.mark.parametrize(
    ("file", "layout", "target"),
    [
        ("beauty_2014", "2014", "Beauty"),
        ("gift_cards", "2018", "Gift_Cards"),
        ("all_beauty_2023", "2023", "All_Beauty"),
    ],
)
def test_packaged_datasets_load(file, layout, target):
    from calrec_jax.pipeline import Line

    try:
        config.load([f"datasets/{file}.gin"], ["DATA_DIR='dumps'", "run.run_dir='x'"])
        assert gin.query_parameter("prepare.layout") == layout
        line = Line()
    finally:
        gin.clear_config()
    assert (line.target, line.data_dir, line.all_categories) == (target, "dumps", (target,))

"""Gin files and flags, as T5X users know them, with every mistake in them an error that names the way out.

Notable: gin itself ignores a macro that nothing reads and a scope that nothing enters, so the files are read once here,
before gin parses them: unused macros, macros left at `%gin.REQUIRED`, unknown names and imports of foreign modules are
found there, with file and line. Values are gin's literals and references to the project's configurables; nothing in a
file is executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gin
from gin import config_parser

from calrec_jax.errors import CalrecError

PACKAGED = pathlib.Path(__file__).parent / "gin_configs"
# Every module with a configurable, so that any verb can check a whole run file. Those with TensorFlow are loaded by the
# verb that needs them; until then their configurables are known by name alone.
MODULES = (
    "calrec_jax.data.prepare",
    "calrec_jax.data.own_tables",
    "calrec_jax.data.templates",
    "calrec_jax.data.shop",
    "calrec_jax.tokenizer",
    "calrec_jax.models.transformer",
    "calrec_jax.losses",
    "calrec_jax.train.loop",
    "calrec_jax.decode.run",
    "calrec_jax.rank.run",
    "calrec_jax.baselines.sasrec",
    "calrec_jax.baselines.train",
    "calrec_jax.evaluate.run",
    "calrec_jax.export.run",
    "calrec_jax.pipeline",
)
TENSORFLOW_CONFIGURABLES = ("eval_tasks",)
_MAX_DEPTH = 20


@dataclasses.dataclass(frozen=True)
class Binding:
    """One line `scope/selector.parameter = value`, or `name = value` for a macro (parameter is then empty)."""

    scope: str
    selector: str
    parameter: str
    required: bool
    where: str

    @property
    def is_macro(self) -> bool:
        """Whether the line gives a value to a macro."""
        return not self.parameter

    @property
    def name(self) -> str:
        """The left side, as written."""
        key = f"{self.scope}/{self.selector}" if self.scope else self.selector
        return f"{key}.{self.parameter}" if self.parameter else key


@dataclasses.dataclass
class Config:
    """What the files and flags say, in the order in which gin applies it.

    Attributes:
      bindings: every line that sets something.
      macros_read: macro to where it is read first.
      scopes_entered: scopes of references.
      texts: source and text for gin, without includes, cut where one stood and with each line at its own number.
    """

    bindings: list[Binding] = dataclasses.field(default_factory=list)
    macros_read: dict[str, str] = dataclasses.field(default_factory=dict)
    scopes_entered: set[str] = dataclasses.field(default_factory=set)
    texts: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def check_scopes(self, known: Iterable[str], selector: str | None = None) -> None:
        """Raises a `CalrecError` if a binding's scope is neither in `known` nor entered by a reference.

        Args:
          known: scopes that the run enters.
          selector: look at this configurable's bindings alone, which the run calls in `known`.
        """
        names = {*known, *self.scopes_entered}
        for binding in self.bindings:
            if selector is not None and binding.selector.rsplit(".", 1)[-1] != selector:
                continue
            for scope in binding.scope.split("/") if binding.scope else ():
                if scope not in names:
                    what = f"{selector} in the scope" if selector is not None else "the scope"
                    raise CalrecError(f"{binding.where}: nothing uses {what} {scope}/{_nearest(scope, names)}")

    def check_not_bound(self, selector: str, parameters: Iterable[str], reason: str) -> None:
        """Raises a `CalrecError` if one of `parameters` is bound, since the caller passes them itself."""
        for binding in self.bindings:
            if binding.selector.rsplit(".", 1)[-1] == selector and binding.parameter in set(parameters):
                raise CalrecError(f"{binding.where}: {binding.name} has no effect: {reason}")


class _References(config_parser.ParserDelegate):
    """Records what values refer to; a reference stands for itself."""

    _REQUIRED = object()

    def __init__(self, config: Config):
        self.config = config
        self.macros: list[str] = []  # of the statement being parsed

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Any:
        del evaluate
        self.config.scopes_entered.update(scoped_name.split("/")[:-1])
        return scoped_name

    def macro(self, name: str) -> Any:
        if name == "gin.REQUIRED":
            return self._REQUIRED
        self.macros.append(name)
        return name


def load(
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    modules: Sequence[str] = MODULES,
    skip: Sequence[str] = TENSORFLOW_CONFIGURABLES,
) -> Config:
    """Makes gin files and bindings the process's configuration, in place of what was there.

    Args:
      files: paths, sought as they are, then under `search_paths`, then among the packaged ones (`runs/quickstart.gin`).
      bindings: `NAME=value` or `scope/selector.parameter=value`; they override the files.
      search_paths: folders.
      modules: imported first: they hold the configurables.
      skip: configurables that are not loaded and whose bindings are passed over.

    Raises:
      CalrecError: a file that is missing or cannot be parsed; a foreign import; a macro that nothing reads, that is not
        set, or that nothing defines; an unknown configurable or parameter. The message gives file, line, and the
        nearest names.
    """
    for module in modules:
        importlib.import_module(module)
    folders = [*search_paths, str(PACKAGED)]
    config = Config()
    for file in files:
        _read_file(config, file, folders, where="--gin_file", depth=0)
    for binding in bindings:
        _read(config, binding, f"--gin.{binding}", folders, depth=0, flag=True)
    _check_macros(config)
    _check_names(config, set(skip))

    gin.clear_config()
    for source, text in config.texts:
        try:
            gin.parse_config(text, skip_unknown=list(skip))
        except (ValueError, SyntaxError, ImportError) as error:
            raise CalrecError(_one_line(error).replace("bindings string", source)) from error
    try:
        gin.finalize()
    except ValueError as error:
        raise CalrecError(_one_line(error)) from error
    return config


def _find(file: str, folders: Sequence[str], where: str) -> pathlib.Path:
    for candidate in (pathlib.Path(file), *(pathlib.Path(folder) / file for folder in folders)):
        if candidate.is_file():
            return candidate
    packaged = sorted(path.relative_to(PACKAGED).as_posix() for path in PACKAGED.rglob("*.gin"))
    hint = _nearest(file, packaged) or f"; the packaged run files are {', '.join(p for p in packaged if 'runs/' in p)}"
    folder_hint = " is a folder, not a file" if pathlib.Path(file).is_dir() else " is not there"
    raise CalrecError(
        f"{where}: {file}{folder_hint}, nor under {', '.join(folders[:-1]) or 'the packaged files'}{hint}"
    )


def _read_file(config: Config, file: str, folders: Sequence[str], where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise CalrecError(f"{where}: {file} includes itself")
    path = _find(file, folders, where)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalrecError(f"{where}: cannot read {path}: {_one_line(error)}") from error
    _read(config, text, str(path), folders, depth)


def _read(config: Config, text: str, source: str, folders: Sequence[str], depth: int, *, flag: bool = False) -> None:
    references = _References(config)
    lines, start = io.StringIO(text).readlines(), 0
    try:
        for statement in config_parser.ConfigParser(text, references):
            where = source if flag else f"{source}:{statement.location.line_num}"
            config.macros_read.update({name: where for name in references.macros if name not in config.macros_read})
            references.macros.clear()
            if isinstance(statement, config_parser.IncludeStatement):
                end = statement.location.line_num - 1
                config.texts.append((source, "\n" * start + "".join(lines[start:end])))
                start = end + 1
                _read_file(config, statement.filename, folders, where, depth + 1)
            elif isinstance(statement, config_parser.ImportStatement):
                if statement.module.split(".")[0] != "calrec_jax":
                    raise CalrecError(f"{where}: only modules of calrec_jax can be imported, not {statement.module}")
            elif isinstance(statement, config_parser.BindingStatement):
                required = statement.value is _References._REQUIRED
                scope, selector, parameter = statement.scope, statement.selector, statement.arg_name or ""
                config.bindings.append(Binding(scope, selector, parameter, required, where))
        config.texts.append((source, "\n" * start + "".join(lines[start:])))
    except (SyntaxError, ValueError, EOFError) as error:
        raise CalrecError(f"{source}: {_syntax(error)}{_QUOTES if flag else ''}") from error
    except Exception as error:  # tokenize.TokenError, which is the tokeniser's own class
        if type(error).__name__ != "TokenError":
            raise
        raise CalrecError(f"{source}: {error.args[0]}{_QUOTES if flag else ''}") from error


_QUOTES = "; a text needs quotes of its own, as in --gin.NAME='\"text\"'"


def _syntax(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        message = (
            (error.msg or "").splitlines()[-1].strip().rstrip(".")
        )  # the last line is gin's, any before it Python's
        return f"line {error.lineno}: {message}" if error.lineno else message
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_macros(config: Config) -> None:
    macros: Mapping[str, Binding] = {binding.name: binding for binding in config.bindings if binding.is_macro}
    for name, where in config.macros_read.items():
        if name not in macros:
            raise CalrecError(
                f"{where}: nothing sets the macro {name}{_nearest(name, macros)}; set it by --gin.{name}=…"
            )
    for name, macro in macros.items():
        if name not in config.macros_read:
            names = {*config.macros_read} - {*macros} or {*config.macros_read}
            raise CalrecError(f"{macro.where}: nothing uses the macro {name}{_nearest(name, names)}")
    unset = [name for name, macro in macros.items() if macro.required]
    if unset:
        flags = " ".join(_FLAGS.get(name, f"--gin.{name}=…") for name in unset)
        plural = "macro" if len(unset) == 1 else "macros"
        raise CalrecError(f"{macros[unset[0]].where}: the {plural} {', '.join(unset)} must be set: {flags}")


_FLAGS = {"RUN_DIR": "--run_dir=DIR"}


def _check_names(config: Config, skip: set[str]) -> None:
    for binding in config.bindings:
        if binding.is_macro or binding.selector in skip:
            continue
        try:
            configurable = gin.get_configurable(binding.selector)
        except ValueError as error:
            nearest = _nearest(binding.selector, {name.rsplit(".", 1)[-1] for name, _ in gin.config._REGISTRY.items()})
            raise CalrecError(f"{binding.where}: there is no {binding.selector} to configure{nearest}") from error
        parameters = inspect.signature(configurable).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        if binding.parameter not in parameters:
            nearest = _nearest(binding.parameter, parameters)
            raise CalrecError(f"{binding.where}: {binding.selector} has no setting {binding.parameter}{nearest}")


def _nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?` with at most three of `names`, or nothing."""
    folded = {other.lower(): other for other in names}
    close = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else ""

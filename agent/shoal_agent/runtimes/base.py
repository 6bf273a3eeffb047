"""What a runtime is: it loads a bundle's model file and runs it. One conformance test covers all."""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal_agent.runtimes.tensors import Array
from shoal_protos.bundle import Bundle, RuntimeNeed
from shoal_protos.errors import InvalidInput, ShoalError, Unsupported
from shoal_protos.v1.desired_pb2 import RuntimeOptions

MAX_THREADS = 1024
PROVIDER = "provider"  # of `Options.extra`: what to compute on, one of the runtime's `providers`


@dataclass(frozen=True)
class Options:
    """How to load: `threads` = 0 leaves the number to the runtime; `extra` is passed to it as it is, but
    for `provider`, which names what to compute on (default: the CPU)."""

    threads: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)

    def provider(self, default: str, available: tuple[str, ...]) -> str:
        """What to compute on. Raises Unsupported, naming what there is."""
        wanted = self.extra.get(PROVIDER, default)
        if wanted != default and wanted not in available:
            raise Unsupported(
                f"This runtime cannot compute on {wanted[:40]} here.", f"It has {', '.join(available)}."
            )
        return wanted

    @property
    def passed(self) -> dict[str, str]:
        """What goes to the runtime as it is."""
        return {key: value for key, value in self.extra.items() if key != PROVIDER}

    @staticmethod
    def from_proto(message: RuntimeOptions | None) -> Options:
        """Options of a placement or trial; absent options mean one thread."""
        if message is None or (message.threads == 0 and not message.extra):
            return Options()
        return Options(message.threads, dict(message.extra))


@dataclass(frozen=True)
class Facts:
    """What the runtime really does with a loaded bundle."""

    runtime: str
    version: str
    provider: str
    threads: int  # 0 = the runtime's own choice
    # Share of convolutions and matrix products that run in int8, from the runtime's own
    # optimized graph; NaN where the bundle promises no int8 or there are none.
    int8_share: float
    float_operators: tuple[str, ...] = ()  # those that don't, by the runtime's names


@dataclass(frozen=True)
class RuntimeInfo:
    name: str
    version: str
    providers: tuple[str, ...]


class Instance(ABC):
    """One loaded model. `run` may be called from several threads at once."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one batch.

        Args:
            inputs: by the signature's names, dtypes and shapes; C-contiguous, not kept, not written to.

        Returns:
            Every output by name, arrays that the caller owns.

        Raises:
            InvalidInput: the runtime refuses these inputs.
        """

    @abstractmethod
    def facts(self) -> Facts:
        """Measured once and kept; may take as long as a second load."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model. No call may follow; a second `close` does nothing."""

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Runtime(ABC):
    """A plug-in (entry points `shoal.runtimes`). Subclasses implement four short methods; checks,
    limits and errors live here."""

    name = ""

    @abstractmethod
    def version(self) -> str:
        """Installed version. Raises MissingExtra."""

    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """What it can run on here: "CPUExecutionProvider", "CPU", "GPU"... Raises MissingExtra."""

    @abstractmethod
    def _load(self, bundle: Bundle, options: Options) -> Instance:
        """Loads and checks the model against the signature. Any exception that is not a ShoalError
        means that the file is bad."""

    def info(self) -> RuntimeInfo:
        return RuntimeInfo(self.name, self.version(), self.providers())

    def check(self, need: RuntimeNeed) -> None:
        """Raises Unsupported unless this runtime on this machine satisfies `need`."""
        if need.name != self.name:
            raise Unsupported(f"The bundle needs the runtime '{need.name}', not '{self.name}'.")
        version = self.version()
        have = version_key(version)
        if need.version_min and have < version_key(need.version_min):
            raise Unsupported(
                f"The bundle needs {self.name} {need.version_min} or newer; {version} is installed.",
                f"Upgrade it with: pip install -U 'shoal[{self.name}]'",
            )
        if need.version_max and have >= version_key(need.version_max):
            raise Unsupported(
                f"The bundle needs {self.name} older than {need.version_max}; {version} is installed.",
                "Optimize the model again for this version.",
            )
        missing = sorted(set(need.isa) - machine_isa())
        if missing:
            raise Unsupported(
                f"The bundle needs the CPU features {', '.join(missing)}, which this machine lacks.",
                "Use a variant of a class with the same or fewer features.",
            )

    def load(self, bundle: Bundle, options: Options | None = None) -> Instance:
        """Loads a bundle's model.

        Raises:
            Unsupported: another runtime, version or CPU feature is needed.
            MissingExtra: the runtime is not installed.
            InvalidInput: the model file is corrupt or does not have the signature's tensors.
        """
        options = options or Options()
        if not 0 <= options.threads <= MAX_THREADS:
            raise InvalidInput(f"{options.threads} threads are out of range.", f"Use 0 to {MAX_THREADS}.")
        self.check(bundle.config.runtime)
        try:
            return self._load(bundle, options)
        except ShoalError:
            raise
        except MemoryError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"{self.name} cannot load '{bundle.config.runtime.model_file}': {reason(error)}"
            ) from error


def reason(error: BaseException) -> str:
    """First line of an error that a runtime raised, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def version_key(version: str) -> tuple[int, ...]:
    """Comparable form of a release number: "1.32.0.dev1" -> (1, 32); trailing zeros don't count.

    Raises:
        InvalidInput: the text starts with no number.
    """
    match = re.match(r"\d+(?:\.\d+)*", version.strip())
    if match is None:
        raise InvalidInput(f"'{version[:40]}' is not a version number.")
    numbers = [int(part) for part in match.group().split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@functools.lru_cache(maxsize=1)
def machine_isa() -> frozenset[str]:
    """This machine's CPU features by the profile's names."""
    from shoal_agent import processor

    return frozenset(processor.features(processor.architecture()))


def share(quantized: int, floating: int) -> float:
    """Quantized operations of all; NaN when there are none."""
    total = quantized + floating
    return quantized / total if total else math.nan

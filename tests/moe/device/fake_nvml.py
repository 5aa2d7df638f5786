"""A library in place of `pynvml` with its own account of energy and time, which lies where it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

UINT, ULONGLONG = 1, 3  # NVML's type codes
MEMORY_TEMP, POWER_AVERAGE, POWER_INSTANT = 82, 185, 186
NOT_SUPPORTED, FUNCTION_NOT_FOUND, LOST = 3, 13, 15


class NVMLError(Exception):
    """As in pynvml, some codes have a class of their own."""

    def __new__(cls, code: int) -> NVMLError:
        kinds = {NOT_SUPPORTED: NVMLErrorNotSupported, FUNCTION_NOT_FOUND: NVMLErrorFunctionNotFound}
        return super().__new__(kinds.get(code, cls), code)

    def __str__(self) -> str:
        return {LOST: "GPU is lost"}.get(self.args[0], f"code {self.args[0]}")


class NVMLErrorNotSupported(NVMLError):
    pass


class NVMLErrorFunctionNotFound(NVMLError):
    pass


class FakeNvml:
    """Two GPUs drawing `power_w` each; the clock is `now_s`, moved by the test.

    `lies` holds what a function answers in place of the truth: a value, an error, or a function of the truth.
    `fields` likewise by NVML's field number: attributes of the answer.
    """

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLErrorNotSupported
    NVMLError_FunctionNotFound = NVMLErrorFunctionNotFound
    NVML_SUCCESS = 0
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 1
    NVML_TEMPERATURE_THRESHOLD_MEM_MAX, NVML_TEMPERATURE_THRESHOLD_GPU_MAX = 2, 3

    def __init__(self, uuid: str) -> None:
        self.uuids, self.names = [uuid, uuid + "-second"], ["Fake H100", "Fake H100"]
        self.now_s, self.power_w, self.energy_mj = 100.0, 500.0, 5_000_000.0
        self.counters: dict[int, Any] = {74: 0, 269: 0, 270: 0, 271: 0}
        self.lies: dict[str, Any] = {}
        self.fields: dict[int, dict[str, Any]] = {}
        self.fail_after: int | None = None
        self.missing: set[str] = set()
        self.started = self.device_calls = 0
        self.field_calls: list[list[int]] = []

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.energy_mj += 1e3 * self.power_w * seconds

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__").get("missing", ()):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def _answer(self, name: str, truth: Any) -> Any:
        self.device_calls += 1
        if self.fail_after is not None and self.device_calls > self.fail_after:
            raise NVMLError(LOST)
        lie = self.lies.get(name, truth)
        if isinstance(lie, NVMLError):
            raise lie
        return lie(truth) if callable(lie) else lie

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in self.uuids:
            raise NVMLError(6)
        return self.uuids.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.uuids[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return self._answer("mig", [0, 0])

    def nvmlDeviceGetTemperatureV(self, handle: int, sensor: int) -> int:
        return self._answer("temp", 47)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self._answer("older temp", 46)

    def nvmlDeviceGetTemperatureThreshold(self, handle: int, threshold: int) -> int:
        name = ("SHUTDOWN", "SLOWDOWN", "MEM_MAX", "GPU_MAX")[threshold]
        return self._answer(name, (95, 89, 95, 87)[threshold])

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._answer("limit", 700_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
        return self._answer("energy", self.energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._answer("power", round(1e3 * self.power_w))

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return self._answer("clock", {1: 1965, 2: 2619}[clock])

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._answer("util", 98), memory=12)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self._answer("reasons", 4)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[SimpleNamespace]:
        self.field_calls.append(fields)
        return self._answer("fields", [self._field(field) for field in fields])

    def _field(self, field: int) -> SimpleNamespace:
        # Only the member that the type names is right, as in a C union.
        if field in self.counters:
            value, kind = SimpleNamespace(ullVal=self.counters[field], uiVal=-1, dVal=-1.0), ULONGLONG
        else:
            number = 44 if field == MEMORY_TEMP else round(1e3 * self.power_w)
            value, kind = SimpleNamespace(uiVal=number, ullVal=-1, dVal=-1.0), UINT
        truth = {"fieldId": field, "nvmlReturn": 0, "valueType": kind, "value": value}
        return SimpleNamespace(**(truth | self.fields.get(field, {})))

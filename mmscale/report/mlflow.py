"""Figures to MLflow, when `log.mlflow` asks for it: `RUN/mlflow.db`, or a tracking server."""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from mmscale.config.load import flatten
from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.outputs import require_folder
from mmscale.report.sink import Sink, figures_of, kept_id

_SERVER = "MLFLOW_TRACKING_URI"
# What MLflow takes in the name of a figure; all else becomes `_`.
_ODD = re.compile(r"[^\w\-. :/]")
# Most of one request.
_METRICS, _PARAMETERS, _CHARACTERS = 1000, 100, 6000


class MlflowSink(Sink):
    """Logs each line's figures; a resumed run goes on under the same id."""

    setting = library = extra = "mlflow"
    _client: Any = None
    _id = ""

    @classmethod
    def require(cls, config: Config) -> None:
        super().require(config)
        if config.log.mlflow == "online" and not os.environ.get(_SERVER):
            raise ConfigError(
                f"log.mlflow=online needs {_SERVER}, which says where; set it, or "
                "log.mlflow=offline"
            )

    def _begin(self, config: Config) -> None:
        folder = Path(config.run.dir).resolve()
        offline = config.log.mlflow == "offline"
        # It tells how it makes its tables, in the middle of the run's own lines.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if offline:
            # It would try for half a minute.
            require_folder("", folder)
        address = f"sqlite:///{folder / 'mlflow.db'}" if offline else os.environ[_SERVER]
        self._client = self._imported.MlflowClient(tracking_uri=address)
        self._id = kept_id(
            folder / "mlflow-id", lambda: self._created(config, folder if offline else None)
        )

    def _created(self, config: Config, folder: Path | None) -> str:
        """A new run with its settings, in the experiment named `log.wandb_project`."""
        name = config.log.wandb_project
        found = self._client.get_experiment_by_name(name)
        artifacts = folder and (folder / "mlflow").as_uri()
        experiment = (
            found.experiment_id if found else self._client.create_experiment(name, artifacts)
        )
        run = self._client.create_run(experiment, run_name=Path(config.run.dir).name)
        parameter = self._imported.entities.Param
        settings = [
            parameter(key, str(value)[:_CHARACTERS]) for key, value in flatten(config).items()
        ]
        for start in range(0, len(settings), _PARAMETERS):
            part = settings[start : start + _PARAMETERS]
            self._client.log_batch(run.info.run_id, params=part)
        return str(run.info.run_id)

    def _send(self, lines: list[dict[str, Any]]) -> None:
        metric, now = self._imported.entities.Metric, int(time.time() * 1000)
        metrics = [
            metric(_ODD.sub("_", name), value, now, int(line.get("step", 0)))
            for line in lines
            for name, value in figures_of(line).items()
        ]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS])

    def _end(self) -> None:
        self._client.set_terminated(self._id)

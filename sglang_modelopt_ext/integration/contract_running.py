"""The rows of the contract with SGLang (:mod:`.contract`) about a server that runs: updates of its weights, and what it tells."""

from __future__ import annotations

from sglang_modelopt_ext.integration.uses import Called, Object, Use

UPDATES: tuple[Use, ...] = (
    Called("managers.io_struct.BeginWeightUpdateReqOutput", "refuses a session", (), ("success", "message")),
    Called("managers.io_struct.EndWeightUpdateReqOutput", "says how a session ended", (), ("success", "message")),
    Object("managers.io_struct.BeginWeightUpdateReqInput", "whose weights it is about", ("selector",)),
    Called(
        "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._select_runners",
        "the models of a session",
        ("selector",),
    ),
    Object(
        "model_executor.model_runner_components.weight_updater.WeightUpdater",
        "the model whose weights change",
        ("get_model", "get_model_runner", "device", "model_config"),
    ),
    Object(
        "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
        "the session of all ranks",
        ("_session", "tp_cpu_group", "flush_cache"),
    ),
    Called(
        "model_loader.loader.DefaultModelLoader.restore_weights_before_loading",
        "takes the old weights away when a session ends",
        ("model", "target_device"),
    ),
    Called(
        "model_loader.loader.DefaultModelLoader.load_weights_and_postprocess",
        "loads the tensors of a session",
        ("model", "weights", "target_device"),
    ),
)

OBSERVABILITY: tuple[Use, ...] = (
    Object("managers.scheduler.Scheduler", "a rank", ("tp_worker", "metrics_collector")),
    Object("managers.tp_worker.TpModelWorker", "the model of a rank", ("model_runner",)),
    Object(
        "managers.scheduler_components.internal_state.SchedulerInternalStateController",
        "what /server_info says of a rank",
        ("scheduler",),
    ),
    Object("managers.io_struct.GetInternalStateReqOutput", "the answer", ("internal_state",)),
    Object("observability.metrics_collector.SchedulerMetricsCollector", "labels of a rank's metrics", ("labels",)),
)

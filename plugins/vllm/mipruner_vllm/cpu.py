"""CPU worker of vLLM, with a flag that only the GPU worker of vLLM sets after loading."""

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """Enables `MRoPE.recompute_mrope_positions` after encoding, which vLLM 0.32 does not do on a CPU."""

    def load_model(self, **options) -> None:
        super().load_model(**options)
        runner = self.model_runner
        recomputes = getattr(runner.model, "supports_multimodal_pruning", False)
        config = runner.model_config.multimodal_config
        runner.is_multimodal_pruning_enabled = recomputes and config.is_multimodal_pruning_enabled()

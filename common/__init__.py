"""Shared vocabulary of lipllm: models, norms, certificates, bundles, data and run bookkeeping."""

"""A distillation on a cluster: `ray job submit --working-dir . -- python -m ray_jobs.distil CHECKPOINT --out DIR …`."""

from ray_jobs.job import run_job

if __name__ == "__main__":
    run_job("distil")

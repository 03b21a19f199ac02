"""The search on a cluster: `ray job submit --working-dir . -- python -m ray_jobs.search --run DIR …`."""

from ray_jobs.job import run_job

if __name__ == "__main__":
    run_job("search")

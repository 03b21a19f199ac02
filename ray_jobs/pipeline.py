"""All stages on a cluster: `ray job submit --working-dir . -- python -m ray_jobs.pipeline --run DIR …`.

What is done already is not done again, so a pipeline that was interrupted is taken up by the same command.
"""

from ray_jobs.job import run_job

if __name__ == "__main__":
    run_job("pipeline")

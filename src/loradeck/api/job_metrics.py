"""Prometheus metrics of a server's fine-tuning jobs, read from their store."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from loradeck.live.job_store import JobStore

MOST = 100  # running jobs with series of their own, so that clients cannot create any number of them
LABELS = ("job", "name")


def job_metrics(jobs: JobStore) -> Iterator[Metric]:
    """Yield how many jobs are in each status, and how far the running ones are.

    Raises:
        BusyError: the server is shutting down.
    """
    counts = GaugeMetricFamily("loradeck_jobs", "Fine-tuning jobs, by status.", labels=("status",))
    for status, count in jobs.counts().items():
        counts.add_metric((status,), count)
    yield counts
    steps = GaugeMetricFamily("loradeck_job_steps", "Steps taken.", labels=LABELS)
    total = GaugeMetricFamily("loradeck_job_total_steps", "Steps to take.", labels=LABELS)
    tokens = GaugeMetricFamily("loradeck_job_trained_tokens", "Tokens read.", labels=LABELS)
    loss = GaugeMetricFamily("loradeck_job_loss", "Training loss of the last step.", labels=LABELS)
    for record in [each for each in jobs.pending() if each.status == "running"][:MOST]:
        labels = (record.id, record.name)
        steps.add_metric(labels, record.steps)
        total.add_metric(labels, record.total_steps or 0)
        tokens.add_metric(labels, record.trained_tokens or 0)
        losses = [
            event.data["train_loss"] for event in jobs.events(record.id, limit=5)[0] if "train_loss" in event.data
        ]
        if losses:
            loss.add_metric(labels, losses[0])
    yield from (steps, total, tokens, loss)

"""The alignment instrument: audits, organisms, strategies, statistics, experiments, reports."""

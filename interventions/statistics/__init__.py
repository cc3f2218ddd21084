"""Statistics of causal traces (P0) and of paired evaluations: estimates, intervals and tests.

All functions are plain NumPy, take a seed, and use bounded memory.
"""

from interventions.statistics.bootstrap import Interval, bootstrap_rows, mean_interval, percentiles
from interventions.statistics.comparison import accuracy, holm, mcnemar, paired, paired_columns
from interventions.statistics.intervals import Over, counted_samples, rr_interval, rr_resamples, rr_summary
from interventions.statistics.permutation import Difference, permutation_test
from interventions.statistics.proportions import LEAST, NOT_ENOUGH, exact_bound, few_changes, widened, wilson
from interventions.statistics.ranking import correlations, rank_stability
from interventions.statistics.restoration import EPS, STATISTICS, Statistic, normalised, rr
from interventions.statistics.tables import Traced, write_effects, write_rows
from interventions.statistics.text import change_text, interval_text

__all__ = [
    "EPS",
    "LEAST",
    "NOT_ENOUGH",
    "STATISTICS",
    "Difference",
    "Interval",
    "Over",
    "Statistic",
    "Traced",
    "accuracy",
    "bootstrap_rows",
    "change_text",
    "correlations",
    "counted_samples",
    "exact_bound",
    "few_changes",
    "holm",
    "interval_text",
    "mcnemar",
    "mean_interval",
    "normalised",
    "paired",
    "paired_columns",
    "percentiles",
    "permutation_test",
    "rank_stability",
    "rr",
    "rr_interval",
    "rr_resamples",
    "rr_summary",
    "widened",
    "wilson",
    "write_effects",
    "write_rows",
]

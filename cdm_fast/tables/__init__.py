"""Tables of numbers: their densities, density ratios and mutual information, as scikit-learn estimators."""

from cdm_fast.host.optional import need

need("sklearn", "cdm_fast.tables")

from cdm_fast.tables.density import CDMDensity as CDMDensity  # noqa: E402
from cdm_fast.tables.information import ConfidenceInterval as ConfidenceInterval  # noqa: E402
from cdm_fast.tables.information import MutualInformation as MutualInformation  # noqa: E402
from cdm_fast.tables.ratio import DensityRatio as DensityRatio  # noqa: E402
from cdm_fast.tables.ratio import TwoSampleTest as TwoSampleTest  # noqa: E402
from cdm_fast.tables.ratio import effective_sample_size as effective_sample_size  # noqa: E402
from cdm_fast.tables.ratio import log_density_ratio as log_density_ratio  # noqa: E402

"""Images, samples and data sets in the forms that users have them."""

__all__ = ["conversion", "datasets", "folders", "orientation", "samples"]

"""The commands of `surgery`, one file each. torch is imported only when one runs, so that help and completion are quick."""

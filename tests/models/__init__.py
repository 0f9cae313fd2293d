"""Tests of elasticore.models; a package, so that its files may share helpers and names."""

"""Starting runs on one machine or a cluster; imports no training code."""

//! Batches of datagrams.

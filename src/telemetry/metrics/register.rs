//! Creates and registers metrics.

use std::cell::RefCell;

use prometheus::core::{Collector, Desc};
use prometheus::{
    Error, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};

/// A registry under construction. Each method creates and registers one metric; the methods with a plural name create
/// metrics with labels. They fail if the name is invalid or already registered.
pub(super) struct Register {
    registry: Registry,
    descriptions: RefCell<Vec<Desc>>,
}

impl Register {
    /// Creates an empty registry whose metric names start with `adsidecar_`.
    pub(super) fn new() -> Result<Self, Error> {
        let registry = Registry::new_custom(Some("adsidecar".into()), None)?;
        Ok(Self { registry, descriptions: RefCell::default() })
    }

    /// The registered metrics, in the order of registration.
    pub(super) fn descriptions(&self) -> Vec<Desc> {
        self.descriptions.borrow().clone()
    }

    pub(super) fn into_registry(self) -> Registry {
        self.registry
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.add(IntCounter::new(name, help)?)
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::new(name, help)?)
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn float(&self, name: &str, help: &str) -> Result<Gauge, Error> {
        self.add(Gauge::new(name, help)?)
    }

    pub(super) fn floats(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, Error> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, Error> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, Error> {
        self.registry.register(Box::new(collector.clone()))?;
        self.descriptions.borrow_mut().extend(collector.desc().into_iter().cloned());
        Ok(collector)
    }
}

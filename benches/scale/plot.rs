//! The measurements as a picture: SVG with three panels, both axes logarithmic.

use std::fmt::Write;

use crate::results::{Measured, Report, What};

const PANEL: f64 = 300.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 66.0;
const GAP: f64 = 84.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 74.0;
const NFTLET: &str = "#0b6bcb";
const NFTLET_LIGHT: &str = "#7fb4e6";
const OTHER: &str = "#c2410c";

/// A line of a panel.
struct Series {
    name: &'static str,
    colour: &'static str,
    /// Endpoints of all services, and the value.
    points: Vec<(f64, f64)>,
}

/// A panel: a title, the unit of its values, and lines.
struct Panel {
    title: &'static str,
    /// Writes a value of the vertical axis.
    label: fn(f64) -> String,
    series: Vec<Series>,
}

/// A logarithmic axis over whole decades.
struct Axis {
    from: i32,
    to: i32,
    start: f64,
    length: f64,
}

impl Axis {
    /// An axis that has room for all values.
    fn new(values: impl Iterator<Item = f64>, start: f64, length: f64) -> Self {
        let logarithms: Vec<f64> = values.map(f64::log10).collect();
        let least = logarithms.iter().copied().fold(f64::INFINITY, f64::min);
        let most = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let from = least.floor() as i32;
        Self {
            from,
            to: (most.ceil() as i32).max(from + 1),
            start,
            length,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let part = (value.log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        self.start + part * self.length
    }

    /// The powers of ten on it.
    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.from..=self.to).map(|power| 10_f64.powi(power))
    }

    /// The first digits between them, for fine lines.
    fn between(&self) -> impl Iterator<Item = f64> {
        let powers = self.from..self.to;
        powers.flat_map(|power| (2..10).map(move |digit| f64::from(digit) * 10_f64.powi(power)))
    }
}

/// The picture. Where nothing was measured for a panel it is left out.
pub fn draw(report: &Report) -> String {
    let panels: Vec<Panel> = panels(&report.sizes)
        .into_iter()
        .filter(|panel| !panel.series.is_empty())
        .collect();
    let width = LEFT + panels.len() as f64 * (PANEL + GAP) - GAP + 24.0;
    let height = TOP + HEIGHT + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" \
         fill=\"#333\">\n\
         <title>nftlet by the size of the cluster</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (number, panel) in panels.iter().enumerate() {
        let left = LEFT + number as f64 * (PANEL + GAP);
        panel.draw(left, &mut svg);
    }
    append(
        &mut svg,
        format_args!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" font-size=\"10\" fill=\"#888\">\
             Linux {}, {} processors</text>\n</svg>\n",
            width - 24.0,
            height - 8.0,
            escape(&report.kernel),
            report.processors
        ),
    );
    svg
}

fn panels(sizes: &[Measured]) -> [Panel; 3] {
    let series = |name, colour, value: &dyn Fn(&Measured) -> Option<f64>| {
        let mut points: Vec<(f64, f64)> = sizes
            .iter()
            .filter_map(|measured| {
                let endpoints = measured.size.services * measured.size.endpoints;
                let value = value(measured).filter(|value| *value > 0.0)?;
                Some((endpoints as f64, value))
            })
            .collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Series {
            name,
            colour,
            points,
        }
    };
    let kept = |all: Vec<Series>| all.into_iter().filter(|it| !it.points.is_empty()).collect();
    let of = |what| move |measured: &Measured| measured.get(what);
    [
        Panel {
            title: "First program",
            label: seconds,
            series: kept(vec![
                series("kube-proxy's shape, nft -f", OTHER, &|it| {
                    it.kube_proxy.loaded().map(|(first, _)| first)
                }),
                series(
                    "process start to rules in place",
                    NFTLET_LIGHT,
                    &of(What::Start),
                ),
                series("nftlet", NFTLET, &of(What::FirstProgram)),
            ]),
        },
        Panel {
            title: "One endpoint replaced",
            label: seconds,
            series: kept(vec![
                series("kube-proxy's shape, nft -f", OTHER, &|it| {
                    it.kube_proxy.loaded().map(|(_, change)| change)
                }),
                series(
                    "99th percentile",
                    NFTLET_LIGHT,
                    &of(What::ReplacedEndToEndP99),
                ),
                series(
                    "nftlet, from the server",
                    NFTLET,
                    &of(What::ReplacedEndToEnd),
                ),
            ]),
        },
        Panel {
            title: "Resident memory",
            label: bytes,
            series: kept(vec![
                series("peak", NFTLET_LIGHT, &|it| {
                    it.get(What::Peak).map(in_mebibytes)
                }),
                series("nftlet, after settling", NFTLET, &|it| {
                    it.get(What::Resident).map(in_mebibytes)
                }),
            ]),
        },
    ]
}

impl Panel {
    fn draw(&self, left: f64, svg: &mut String) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::new(points().map(|point| point.0), left, PANEL);
        let y = Axis::new(points().map(|point| point.1), TOP + HEIGHT, -HEIGHT);
        let (right, bottom) = (left + PANEL, TOP + HEIGHT);
        append(
            svg,
            format_args!(
                "<text x=\"{left}\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
                TOP - 40.0,
                self.title
            ),
        );
        for (value, stroke) in shades(&x) {
            let at = x.place(value);
            append(
                svg,
                format_args!(
                    "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"{stroke}\" fill=\"none\"/>\n"
                ),
            );
        }
        for (value, stroke) in shades(&y) {
            let at = y.place(value);
            append(
                svg,
                format_args!(
                    "<path d=\"M{left} {at:.1}H{right}\" stroke=\"{stroke}\" fill=\"none\"/>\n"
                ),
            );
        }
        for value in x.decades() {
            append(
                svg,
                format_args!(
                    "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                    x.place(value),
                    bottom + 16.0,
                    endpoints(value)
                ),
            );
        }
        for value in y.decades() {
            append(
                svg,
                format_args!(
                    "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                    left - 6.0,
                    y.place(value) + 4.0,
                    (self.label)(value)
                ),
            );
        }
        append(
            svg,
            format_args!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">endpoints of all services</text>\n",
                left + PANEL / 2.0,
                bottom + 34.0
            ),
        );
        for (number, series) in self.series.iter().enumerate() {
            series.draw(&x, &y, svg);
            let (column, row) = (number % 2, number / 2);
            let (at, line) = (left + column as f64 * 160.0, TOP - 24.0 + row as f64 * 14.0);
            append(
                svg,
                format_args!(
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{}\"/>\
                     <text x=\"{:.1}\" y=\"{line}\" font-size=\"10\">{}</text>\n",
                    at + 4.0,
                    line - 3.5,
                    series.colour,
                    at + 12.0,
                    escape(series.name)
                ),
            );
        }
    }
}

impl Series {
    fn draw(&self, x: &Axis, y: &Axis, svg: &mut String) {
        let mut path = String::new();
        for (number, point) in self.points.iter().enumerate() {
            let command = if number == 0 { 'M' } else { 'L' };
            let (at, height) = (x.place(point.0), y.place(point.1));
            append(&mut path, format_args!("{command}{at:.1} {height:.1}"));
            append(
                svg,
                format_args!(
                    "<circle cx=\"{at:.1}\" cy=\"{height:.1}\" r=\"3.5\" fill=\"{}\"/>\n",
                    self.colour
                ),
            );
        }
        append(
            svg,
            format_args!(
                "<path d=\"{path}\" stroke=\"{}\" stroke-width=\"2\" fill=\"none\"/>\n",
                self.colour
            ),
        );
    }
}

/// The lines of an axis: fine ones, and those of the decades over them.
fn shades(axis: &Axis) -> impl Iterator<Item = (f64, &'static str)> {
    let fine = axis.between().map(|value| (value, "#f0f0f0"));
    fine.chain(axis.decades().map(|value| (value, "#cfcfcf")))
}

fn in_mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

fn bytes(mebibytes: f64) -> String {
    if mebibytes < 1024.0 {
        format!("{mebibytes:.0} MiB")
    } else {
        format!("{:.1} GiB", mebibytes / 1024.0)
    }
}

fn seconds(value: f64) -> String {
    match value {
        value if value < 0.9e-3 => format!("{:.0} µs", value * 1e6),
        value if value < 0.9 => format!("{:.0} ms", value * 1e3),
        value => format!("{value:.0} s"),
    }
}

fn endpoints(value: f64) -> String {
    match value {
        value if value < 1e3 => format!("{value:.0}"),
        value if value < 1e6 => format!("{:.0}k", value / 1e3),
        value => format!("{:.0}M", value / 1e6),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn append(text: &mut String, what: std::fmt::Arguments) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(what);
}

//! The windows as a picture: SVG with three panels over time, all from zero on.

use std::fmt::Write;

use crate::results::{Report, Window};

const PANEL: f64 = 300.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 66.0;
const GAP: f64 = 84.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 64.0;
const DARK: &str = "#0b6bcb";
const LIGHT: &str = "#7fb4e6";
/// About how many lines an axis has.
const LINES: f64 = 5.0;

/// A line of a panel: a name, a colour and the value of a window.
type Series = (&'static str, &'static str, fn(&Window) -> f64);

struct Panel {
    title: &'static str,
    unit: &'static str,
    series: &'static [Series],
}

const PANELS: [Panel; 3] = [
    Panel {
        title: "A change, from the bytes read",
        unit: "ms",
        series: &[
            ("99th percentile", LIGHT, |it| it.latency_p99 * 1e3),
            ("mean", DARK, |it| it.latency * 1e3),
        ],
    },
    Panel {
        title: "A connection to a ClusterIP",
        unit: "ms",
        series: &[
            ("99th percentile", LIGHT, |it| it.connect_p99 * 1e3),
            ("median", DARK, |it| it.connect * 1e3),
        ],
    },
    Panel {
        title: "Resident memory",
        unit: "MiB",
        series: &[("mean", DARK, |it| it.resident / (1 << 20) as f64)],
    },
];

/// The picture.
pub fn draw(report: &Report) -> String {
    let width = LEFT + PANELS.len() as f64 * (PANEL + GAP) - GAP + 24.0;
    let height = TOP + HEIGHT + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" \
         fill=\"#333\">\n\
         <title>nftlet while endpoints change all the time</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (number, panel) in PANELS.iter().enumerate() {
        let left = LEFT + number as f64 * (PANEL + GAP);
        panel.draw(left, &report.measured.windows, &mut svg);
    }
    append(
        &mut svg,
        format_args!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" font-size=\"10\" fill=\"#888\">\
             {} changes and {} connections a second, {} services, Linux {}, {} processors</text>\n\
             </svg>\n",
            width - 24.0,
            height - 8.0,
            report.rate,
            report.connections,
            report.size,
            report.kernel,
            report.processors
        ),
    );
    svg
}

impl Panel {
    fn draw(&self, left: f64, windows: &[Window], svg: &mut String) {
        let length = windows.last().map_or(1.0, |window| window.to);
        let values = (self.series.iter()).flat_map(|(_, _, of)| windows.iter().map(of));
        let most = values.fold(1e-3, f64::max);
        let (across, up) = (step(length), step(most));
        let lines = (most / up).ceil();
        let (right, bottom) = (left + PANEL, TOP + HEIGHT);
        let x = |seconds: f64| left + seconds / length * PANEL;
        let y = |value: f64| bottom - value / (up * lines) * HEIGHT;
        append(
            svg,
            format_args!(
                "<text x=\"{left}\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
                TOP - 32.0,
                self.title
            ),
        );
        for line in 0..=lines as u32 {
            let value = f64::from(line) * up;
            let at = y(value);
            append(
                svg,
                format_args!(
                    "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#cfcfcf\"/>\
                     <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{} {}</text>\n",
                    left - 6.0,
                    at + 4.0,
                    (value * 1e3).round() / 1e3,
                    self.unit
                ),
            );
        }
        for line in 0..=(length / across) as u32 {
            let seconds = f64::from(line) * across;
            append(
                svg,
                format_args!(
                    "<path d=\"M{0:.1} {TOP}V{bottom}\" stroke=\"#f0f0f0\"/>\
                     <text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\">{seconds} s</text>\n",
                    x(seconds),
                    bottom + 16.0
                ),
            );
        }
        for (number, (name, colour, of)) in self.series.iter().enumerate() {
            let mut path = String::new();
            for (number, window) in windows.iter().enumerate() {
                let command = if number == 0 { 'M' } else { 'L' };
                let (at, height) = (x((window.from + window.to) / 2.0), y(of(window)));
                append(&mut path, format_args!("{command}{at:.1} {height:.1}"));
            }
            let at = left + number as f64 * 130.0;
            append(
                svg,
                format_args!(
                    "<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>\
                     <circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{colour}\"/>\
                     <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{name}</text>\n",
                    at + 4.0,
                    TOP - 15.5,
                    at + 12.0,
                    TOP - 12.0
                ),
            );
        }
    }
}

/// The distance of lines on an axis up to a value: 1, 2 or 5 with zeros.
fn step(most: f64) -> f64 {
    let rough = most / LINES;
    let decade = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * decade);
    steps
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough)
}

fn append(text: &mut String, what: std::fmt::Arguments) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(what);
}

"use strict";
(async () => {
  const figures = [...document.querySelectorAll("[data-surface-plot]")];
  const box = document.getElementById("plotly");
  if (!figures.length || !box) return;

  // The still picture stays where anything is missing, and the page says what.
  const refuse = why => figures.forEach(figure => {
    const note = figure.parentElement.querySelector(".refusal");
    note.textContent = why;
    note.hidden = false;
    figure.dataset.surfacePlot = "refused";
  });
  const context = document.createElement("canvas").getContext("webgl");
  if (!context) return refuse("This browser shows no WebGL, which turning the surface takes: the still picture stays.");
  context.getExtension("WEBGL_lose_context")?.loseContext();
  try {
    const packed = Uint8Array.from(atob(box.textContent.trim()), char => char.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  } catch {
    return refuse("This browser cannot unpack the drawing library in this page: the still picture stays.");
  }

  const query = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function dressed(layout) {
    const [ink, line, page] = ["ink", "line", "page"].map(colour);
    const clear = "rgba(0,0,0,0)";
    const axis = { gridcolor: line, linecolor: line, tickcolor: line, color: ink };
    const made = {
      ...layout,
      font: { color: ink, family: colour("sans"), size: 12 },
      paper_bgcolor: clear, plot_bgcolor: clear,
      hoverlabel: { bgcolor: page, bordercolor: ink, font: { color: ink } },
      showlegend: false,
    };
    if (layout.scene) {
      made.margin = { l: 0, r: 0, t: 0, b: 0 };
      const sides = ["xaxis", "yaxis", "zaxis"].map(name => [name, { ...layout.scene[name], ...axis, backgroundcolor: clear }]);
      made.scene = { ...layout.scene, ...Object.fromEntries(sides), dragmode: "turntable" };
    } else {
      made.margin = { l: 50, r: 10, t: 10, b: 45 };
      made.dragmode = touch ? false : "zoom";
      for (const name of ["xaxis", "yaxis"]) made[name] = { ...layout[name], ...axis };
    }
    return made;
  }

  function turn(plot, key) {
    const eye = { ...plot.layout.scene.camera.eye };
    const away = Math.hypot(eye.x, eye.y, eye.z);
    let [around, up, far] = [Math.atan2(eye.y, eye.x), Math.asin(eye.z / away), away];
    if (key === "ArrowLeft") around -= 0.15;
    else if (key === "ArrowRight") around += 0.15;
    else if (key === "ArrowUp") up = Math.min(up + 0.12, 1.5);
    else if (key === "ArrowDown") up = Math.max(up - 0.12, -1.5);
    else if (key === "+" || key === "=") far = Math.max(far / 1.15, 0.6);
    else if (key === "-") far = Math.min(far * 1.15, 6);
    else return false;
    const flat = far * Math.cos(up);
    Plotly.relayout(plot, { "scene.camera.eye": { x: flat * Math.cos(around), y: flat * Math.sin(around), z: far * Math.sin(up) } });
    return true;
  }

  function move(plot, key) {
    const trace = plot.data[0];
    const last = [trace.x.length - 1, trace.y.length - 1];
    const flat = trace.type === "scatter";
    const at = plot.cursor || (plot.cursor = [last[0] >> 1, last[1] >> 1]);
    if (key === "ArrowLeft") at[0] = Math.max(at[0] - 1, 0);
    else if (key === "ArrowRight") at[0] = Math.min(at[0] + 1, last[0]);
    else if (key === "ArrowDown" && !flat) at[1] = Math.max(at[1] - 1, 0);
    else if (key === "ArrowUp" && !flat) at[1] = Math.min(at[1] + 1, last[1]);
    else return false;
    Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: flat ? at[0] : [at[1], at[0]] }]);
    // Plotly tells of a hover by the pointer only.
    plot.read({ x: trace.x[at[0]], y: trace.y[at[1]], text: flat ? trace.text[at[0]] : trace.text[at[1]][at[0]] });
    return true;
  }

  for (const figure of figures) {
    const drawings = JSON.parse(figure.querySelector("script").textContent);
    const still = figure.parentElement.querySelector(".still");
    const reading = figure.querySelector(".reading");
    const plots = [...figure.querySelectorAll(".plot")];
    const choice = figure.querySelector("select");
    const short = value => Number(value).toPrecision(3).replace("-", "−");

    const draw = () => Promise.all(plots.map(async plot => {
      const chosen = drawings[choice ? choice.selectedIndex : 0];
      const drawn = chosen[plot.dataset.kind];
      plot.hidden = !drawn;
      if (!drawn) return;
      plot.cursor = null;
      // A copy: plotly writes into what it gets.
      const { data, layout } = structuredClone(drawn);
      await Plotly.newPlot(plot, data, dressed(layout), { displayModeBar: false, responsive: true, scrollZoom: false });
      plot.read = ({ x, y, text }) => {
        reading.textContent = `${chosen.height} ${text} at ${data[0].type === "scatter" ? short(x) : short(x) + ", " + short(y)}`;
      };
      plot.on("plotly_hover", event => plot.read(event.points[0]));
    }));

    try {
      figure.hidden = false;
      still.classList.add("replaced");
      await draw();
      figure.dataset.surfacePlot = "drawn";
    } catch {
      figure.dataset.surfacePlot = "failed";
      figure.hidden = true;
      still.classList.remove("replaced");
      continue;
    }
    for (const plot of plots) plot.addEventListener("keydown", event => {
      if (event.ctrlKey || event.altKey || event.metaKey || !plot.data) return;
      if ((plot.dataset.kind === "surface" ? turn : move)(plot, event.key)) event.preventDefault();
    });
    choice?.addEventListener("change", draw);
    figure.querySelector(".reset").addEventListener("click", draw);
    figure.querySelector(".swap").addEventListener("click", event => {
      const shown = still.classList.toggle("replaced");
      figure.querySelector(".turning").hidden = !shown;
      event.target.textContent = shown ? "Show the still picture" : "Show it to be turned";
      event.target.setAttribute("aria-pressed", String(!shown));
      if (shown) for (const plot of plots) Plotly.Plots.resize(plot);
    });
    query.addEventListener("change", draw);
  }
})();
